"""Writes docs/reference: settings, environment variables and messages, from the types that the programs themselves use.

Owns the form of the pages; what they say is said in the code. `python -m tools.reference_pages` writes them, and
tests/test_docs_reference.py holds them to it. The command line has docs/cli.md, metrics have docs/observability.md.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lamella import messages
from lamella.chat import ChatMessage, FunctionTool, ToolCall
from lamella.embedding import EmbeddingsEvent, EmbedRequest
from lamella.response_format import ResponseFormat
from lamella_gateway.settings import Settings
from lamella_worker.config import ENVIRONMENT, FLAGS, WorkerConfig

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reference"

VARIABLES: Mapping[str, tuple[str, str]] = {
    "LAMELLA_REDIS_URL": ("client, gateway, worker, Flower", "The server: redis://, rediss:// or unix:// URL."),
    "LAMELLA_REDIS_URL_FILE": ("the same", "A file that holds the URL; not beside the variable itself."),
    "LAMELLA_REDIS_PASSWORD": ("the same", "The password of a URL that has none."),
    "LAMELLA_REDIS_PASSWORD_FILE": ("the same", "A file that holds the password."),
    "LAMELLA_STORE": ("worker, `lamella models`, `plan`, `bench`", "Directory of the shard cache."),
    "LAMELLA_STATE_DIR": (
        "client, gateway, `lamella up`",
        "Where a running `lamella up` says how to reach it, and a gateway keeps files.",
    ),
    "LAMELLA_PEERS": ("worker, `lamella models pull`", "Hosts that share their stores, with commas between."),
    "LAMELLA_PEER_TOKEN": ("the same, `lamella models share`", "The token that sharing asks for."),
    "LAMELLA_PEER_TOKEN_FILE": ("the same", "A file that holds the token."),
    "LAMELLA_ENCRYPTION_KEYS_FILE": ("client, worker", "The file of the keys that encrypt jobs."),
    "LAMELLA_KEEP_S": ("client, worker", "Seconds that an ended job is kept."),
    "LAMELLA_TRACES": ("client", "OTLP endpoint that spans of submits go to."),
    "LAMELLA_PREFIX": ("Flower", "What every key starts with, where it is not `lamella:`."),
    "LAMELLA_FAILPOINTS": ("worker", "For tests of faults only: where the engine's process is to fail."),
    "FLOWER_BASIC_AUTH": ("Flower", "`user:password` of its pages."),
    "HF_TOKEN": ("worker, `lamella models pull`", "The hub's token, for gated models."),
    "HF_HOME": ("the same", "Where what was fetched from the hub is kept."),
}
MESSAGES: tuple[tuple[str, tuple[Any, ...]], ...] = (  # types, and unions of them
    ("Requests", (messages.GenerateRequest, messages.SamplingParams, ChatMessage, ToolCall, FunctionTool)),
    ("Requests", (ResponseFormat, EmbedRequest)),
    ("Events", (messages.TokenEvent, messages.TokenLogprob, EmbeddingsEvent, messages.Progress)),
    ("Events", (messages.Done, messages.Failed, messages.Cancelled, messages.Usage)),
    ("Status", (messages.JobStatus,)),
    ("Heartbeats", (messages.WorkerInfo, messages.ModelInfo, messages.EngineProcessInfo)),
)


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return every page by its file's name."""
    return {"configuration.md": _configuration(), "environment.md": _environment(), "messages.md": _messages()}


def _configuration() -> str:
    lines = [
        "# Settings",
        "",
        "Written by `python -m tools.reference_pages` from the types that read them. A setting comes from the option",
        "of the command, else the environment, else the file of `--config`, else its default. An unknown key or a",
        "value that cannot work stops the program at its start with the place, the key and the fix.",
        "",
        "## Of a worker",
    ]
    for table, field in WorkerConfig.model_fields.items():
        model = typing.cast(type[BaseModel], field.annotation)
        lines += [
            "",
            f"### `[{table}]`",
            "",
            _first_line(model),
            "",
            "| key | default | values | option, variable | what |",
        ]
        lines.append("|---|---|---|---|---|")
        for key, each in model.model_fields.items():
            dotted = f"{table}.{key}"
            elsewhere = ", ".join(f"`{name}`" for name in (FLAGS.get(dotted), ENVIRONMENT.get(dotted)) if name)
            cells = (f"`{key}`", _default(each), _values(each), elsewhere, each.description or "")
            lines.append(_row(cells))
    lines += [
        "",
        "## Of a gateway",
        "",
        "Options of `lamella serve` ([the command line](../cli.md#lamella-serve)).",
        "",
    ]
    lines += ["| setting | default | what |", "|---|---|---|"]
    lines += [_row((f"`{name}`", _code(default), told)) for name, default, told in _gateway()]
    return "\n".join(lines) + "\n"


def _environment() -> str:
    lines = [
        "# Environment variables",
        "",
        "Written by `python -m tools.reference_pages`; a test holds the list against the code. Options go before them,",
        "they go before files. Those of [Docker Compose](../operations.md#containers) are in `.env.example`.",
        "",
        "| variable | read by | what |",
        "|---|---|---|",
        *(_row((f"`{name}`", *told)) for name, told in VARIABLES.items()),
    ]
    return "\n".join(lines) + "\n"


def _messages() -> str:
    lines = [
        "# Messages",
        "",
        "Written by `python -m tools.reference_pages` from the types that both ends decode with. Everything is JSON;",
        "an unknown key is refused. [Wire](../wire.md) tells which of them goes where, and when.",
    ]
    heading = ""
    for group, models in MESSAGES:
        if group != heading:
            lines += ["", f"## {group}"]
            heading = group
        for model in (each for one in models for each in _members(one)):
            lines += ["", f"### {model.__name__}", "", _first_line(model)]
            if model.model_fields:
                lines += ["", "| key | type | default |", "|---|---|---|"]
            for key, field in model.model_fields.items():
                lines.append(_row((f"`{key}`", _type_name(field.annotation), _default(field))))
    return "\n".join(lines) + "\n"


def _members(one: Any) -> tuple[type[BaseModel], ...]:
    """The types of a union, or the one type itself."""
    if typing.get_origin(one) is typing.Annotated:
        return _members(typing.get_args(one)[0])
    return typing.get_args(one) or (one,)


def _gateway() -> Iterator[tuple[str, object, str]]:
    documented = re.findall(r"^ {8}(\w+): (.+?)(?=^ {8}\w+: |\Z)", Settings.__doc__ or "", re.MULTILINE | re.DOTALL)
    for name, told in documented:
        yield name, getattr(Settings, name), " ".join(told.split())


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0].replace("``", "`")


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    return _code(value)


def _code(value: object) -> str:
    match value:
        case None:
            return "none"
        case SecretStr():
            return f"`{value.get_secret_value()}`"
        case Enum() | Path():
            return f"`{value.value if isinstance(value, Enum) else value}`"
        case BaseModel():
            return "its own"
        case tuple() | list():
            return f"`{json.dumps(list(value), default=str)}`"
        case _:
            return f"`{json.dumps(value, default=str)}`"


def _values(field: FieldInfo) -> str:
    """What is taken: the type and its bounds, or the words."""
    name = _type_name(field.annotation).replace(" or none", "")
    bounds = {key: getattr(each, key) for each in field.metadata for key in ("ge", "le") if hasattr(each, key)}
    if not bounds:
        return name
    if len(bounds) == 2:
        return f"{name}, {bounds['ge']:g} to {bounds['le']:g}"
    ((key, bound),) = bounds.items()
    return f"{name}, {'at least' if key == 'ge' else 'at most'} {bound:g}"


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (Union, types.UnionType):
        names = [_type_name(each) for each in arguments if each is not type(None)]
        return " or ".join([*names, *(["none"] if type(None) in arguments else [])])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(each)}`" for each in arguments)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f'`"{each.value}"`' for each in annotation)
    if origin in (tuple, list) and arguments:
        return f"list of {_type_name(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"table of {_type_name(arguments[1])}"
    plain: dict[Any, str] = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        Path: "path",
        SecretStr: "URL",
    }
    return plain.get(annotation) or str(getattr(annotation, "__name__", annotation))


if __name__ == "__main__":
    main()
