"""From which event on a response is to be streamed: the query of ``GET /v1/responses/{id}``."""

from __future__ import annotations

from starlette.requests import Request

from lamella_gateway.api_error import ApiError
from lamella_gateway.response_request import LOGPROBS

_KNOWN = ("stream", "starting_after", "include", "include[]", "include_obfuscation")
_FROM_THE_START = -1
_MOST_DIGITS = 15


def starting_point(request: Request) -> int | None:
    """Return the number of the last event that the client has, -1 for none; None where it wants no stream.

    Raises:
        ApiError: a parameter is unknown or cannot be.
    """
    query = request.query_params
    for name in query:
        if name not in _KNOWN:
            raise ApiError(400, f"unknown parameter {name!r}", param=name, code="unknown_parameter")
    for name in ("include", "include[]"):
        if any(value != LOGPROBS for value in query.getlist(name)):
            raise ApiError(400, f"{name}: what can be included is {LOGPROBS}", param=name, code="invalid_value")
    if _flag(query.get("include_obfuscation"), "include_obfuscation"):
        raise ApiError(400, "nothing is obfuscated here", param="include_obfuscation", code="invalid_value")
    is_stream = _flag(query.get("stream"), "stream")
    given = query.get("starting_after")
    if given is None:
        return _FROM_THE_START if is_stream else None
    if not given.isascii() or not given.isdecimal() or len(given) > _MOST_DIGITS:
        raise ApiError(
            400,
            f"starting_after is {given[:60]!r}; use the sequence_number of the last event you have",
            param="starting_after",
            code="invalid_value",
        )
    if not is_stream:
        raise ApiError(400, "starting_after needs stream=true", param="starting_after", code="invalid_value")
    return int(given)


def _flag(text: str | None, name: str) -> bool:
    if text in (None, "false", "False"):
        return False
    if text in ("true", "True"):
        return True
    raise ApiError(400, f"{name} is {str(text)[:60]!r}; use true or false", param=name, code="invalid_value")
