"""From a request's bytes to a checked request: size, kind, JSON, fields; every mistake is named with its field.

Owns HTTP 400, 413 and 415. What the fields are is in the modules ``*_request``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from lamella_gateway import service as services
from lamella_gateway.api_error import ApiError

Model = TypeVar("Model", bound=BaseModel)
_SHOWN = 60


async def read_body(request: Request) -> bytes:
    """Return the whole body.

    Raises:
        ApiError: it is too large, or not declared as JSON.
    """
    most = services.of(request).settings.max_body_bytes
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415,
            f"the content type is {kind[:_SHOWN]!r}; send JSON with `Content-Type: application/json`",
            code="not_json",
        )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise _too_large(most)
    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > most:
                raise _too_large(most)
            pieces.append(piece)
    except ClientDisconnect as error:
        raise ApiError(400, "the request ended before its body did", code="incomplete_body") from error
    return b"".join(pieces)


def parse(kind: type[Model], body: bytes) -> Model:
    """Return the request that a body holds.

    Raises:
        ApiError: it is no JSON, or not this request.
    """
    try:
        return kind.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise _explained(kind, error, body) from error


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the request is larger than {most} bytes; send less at once", code="request_too_large")


def _explained(kind: type[BaseModel], error: ValidationError, body: bytes) -> ApiError:
    every = error.errors(include_url=False, include_context=False)
    first = every[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    # Of a union every member complains; the one that came furthest knows best what was meant.
    path, worst = max(((_path(data, each), each) for each in every), key=lambda pair: len(pair[0]))
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or None
    message = _message(kind, worst, param, path)
    code = "unknown_parameter" if worst["type"] == "extra_forbidden" else "invalid_value"
    if worst["type"] == "missing":
        code = "missing_required_parameter"
    return ApiError(400, message, param=param, code=code)


def _path(data: object, error: ErrorDetails) -> tuple[int | str, ...]:
    """Return where in the body an error is; pydantic's own names of union members are left out."""
    path: list[int | str] = []
    for part in error["loc"]:
        below = _below(data, part)
        if below is not None:
            data = below[0]
        elif not (error["type"] == "missing" and part == error["loc"][-1]):
            continue
        path.append(part)
    return tuple(path)


def _below(data: object, part: int | str) -> tuple[object] | None:
    """Return what lies under a key or an index, None if there is no such place."""
    if isinstance(data, Mapping) and part in data:
        return (data[part],)
    if isinstance(data, list) and isinstance(part, int) and part < len(data):
        return (data[part],)
    return None


def _message(kind: type[BaseModel], error: ErrorDetails, param: str | None, path: tuple[int | str, ...]) -> str:
    said = error["msg"].removeprefix("Value error, ")
    reasons: Mapping[str, str] = getattr(kind, "WHY", {})
    match error["type"]:
        case "extra_forbidden":
            known = list(kind.model_fields) if len(path) == 1 else []
            near = difflib.get_close_matches(str(path[-1]) if path else "", known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; docs/gateway.md lists the fields that are known"
            return f"unknown field {param!r}{hint}"
        case "missing":
            why = reasons.get(str(path[0])) if len(path) > 1 else None
            return f"the field {param!r} is missing" + (f". {why}" if why else "")
        case "value_error" if param is None:
            return said
    why = reasons.get(str(path[0])) if path else None
    shown = f"{param!r}: {said[0].lower()}{said[1:]}" if said else f"{param!r} cannot be used"
    return f"{shown}. {why}" if why else shown
