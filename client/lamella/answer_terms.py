"""What a caller asks of an answer beyond its sampling: a format, tools, whether one must be called.

Owns how callers' forms become types, and the words for their mistakes. Neighbours: `request_draft` (which takes the
arguments), `response_format` and `chat` (the types).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from lamella.chat import (
    ChatMessage,
    FunctionTool,
    NamedTool,
    ToolChoice,
    choice_fields,
    message_fields,
    tool_fields,
)
from lamella.errors import RequestError
from lamella.mistakes import explained
from lamella.response_format import FORMATS, ResponseFormat, format_fields

_FORMAT: TypeAdapter[ResponseFormat] = TypeAdapter(ResponseFormat)
_CHOICE: TypeAdapter[ToolChoice] = TypeAdapter(ToolChoice)


class AnswerTerms(NamedTuple):
    """The terms of one answer; None asks for nothing."""

    response_format: ResponseFormat | None = None
    tools: tuple[FunctionTool, ...] | None = None
    tool_choice: ToolChoice | None = None


def checked_answer_terms(response_format: object, tools: object, tool_choice: object) -> AnswerTerms:
    """Return the terms for what a caller gave; None is nothing asked.

    Raises:
        RequestError: one of them is of no form that is known.
    """
    return AnswerTerms(_response_format(response_format), _tools(tools), _tool_choice(tool_choice))


def checked_messages(messages: object) -> tuple[ChatMessage, ...] | None:
    """Return the messages of a chat; None if there is none.

    Raises:
        RequestError: they are not a list of messages.
    """
    if messages is None:
        return None
    form = "give a list such as [{'role': 'user', 'content': 'Hello'}]"
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is of type {type(messages).__name__}; {form}")
    checked = []
    for position, message in enumerate(messages):
        if isinstance(message, ChatMessage):
            checked.append(message)
            continue
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{position}] is of type {type(message).__name__}; {form}")
        try:
            checked.append(ChatMessage.model_validate(message_fields(message), strict=True))
        except ValidationError as error:
            raise RequestError(explained(error, f"messages[{position}].", tuple(ChatMessage.model_fields))) from error
        except ValueError as error:
            raise RequestError(f"messages[{position}]: {error}") from error
    return tuple(checked)


def _response_format(given: object) -> ResponseFormat | None:
    if given is None:
        return None
    try:
        fields = format_fields(given)
        return None if fields is None else _FORMAT.validate_python(fields, strict=True)
    except ValidationError as error:
        raise RequestError(f"response_format: {_within(error)}") from error
    except ValueError as error:
        raise RequestError(f"response_format: {error}") from error


def _within(error: ValidationError) -> str:
    """The first mistake in a format, whose place begins with the name of its kind."""
    first = error.errors(include_url=False)[0]
    kind, *place = [str(part) for part in first["loc"]]
    known = [name for name in FORMATS[kind].model_fields if name != "type"] if kind in FORMATS else []
    if first["type"] == "extra_forbidden":
        return f"unknown key {place[0]!r}; known keys beside 'type': {', '.join(known)}"
    if first["type"] == "missing":
        return f"{place[0]} is missing"
    return f"{'.'.join(place)}: {first['msg'].removeprefix('Value error, ')}"


def _tools(given: object) -> tuple[FunctionTool, ...] | None:
    if given is None:
        return None
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence) or not given:
        raise RequestError("tools must be a list of at least one {'type': 'function', 'function': {...}}")
    tools = []
    for position, tool in enumerate(given):
        try:
            tools.append(FunctionTool.model_validate(tool_fields(tool), strict=True))
        except ValidationError as error:
            known = tuple(FunctionTool.model_fields)
            raise RequestError(explained(error, f"tools[{position}].function.", known)) from error
        except ValueError as error:
            raise RequestError(f"tools[{position}]: {error}") from error
    return tuple(tools)


def _tool_choice(given: object) -> ToolChoice | None:
    if given is None or isinstance(given, NamedTool):
        return given
    try:
        return _CHOICE.validate_python(choice_fields(given))
    except ValidationError as error:
        raise RequestError("tool_choice names no tool; a name has letters, digits, '_', '-' and '.'") from error
    except ValueError as error:
        raise RequestError(f"tool_choice is {str(given)[:60]!r}; {error}") from error
