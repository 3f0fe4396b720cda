"""A conversation as a request carries it: its messages, the tools a model may call, and the calls it made.

Owns the types, their bounds, and how OpenAI's shapes become them. The model's own chat template renders them, in the
engine. Neighbours: `messages` (requests carry them), `request_draft` (takes them from callers), `tool_calls` (finds
calls in an answer).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lamella.wire import Wire, check_unicode, count_characters

MAX_TOOLS = 128
MAX_TOOL_CHARS = 400_000  # of all names, descriptions and schemas together
MAX_CALLS = 128
MAX_ID_CHARS = 200

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]


class FunctionCall(Wire):
    """Which function, and its arguments as JSON text."""

    name: ToolName
    arguments: str = Field(repr=False)


class ToolCall(Wire):
    """One call that a model made; the answer to it names its `id`."""

    id: CallId
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Wire):
    """One turn of a conversation, rendered by the model's own chat template.

    An assistant's turn may call tools, with or without text; a tool's turn is what a call brought.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = Field(default=None, repr=False)
    tool_calls: tuple[ToolCall, ...] | None = Field(default=None, min_length=1, max_length=MAX_CALLS, repr=False)
    tool_call_id: CallId | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("tool_calls belong to an assistant's message")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("tool_call_id belongs to a tool's message")
        if self.content is None and self.tool_calls is None:
            raise ValueError("content is missing; only an assistant's message with tool_calls needs none")
        return self

    @property
    def text(self) -> str:
        """Its content; empty where it has none."""
        return self.content or ""

    @property
    def concerns_tools(self) -> bool:
        """Whether only a template that knows tools can render it."""
        return self.tool_calls is not None or self.tool_call_id is not None

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything in it that a caller wrote."""
        calls = [text for call in self.tool_calls or () for text in (call.id, call.function.arguments)]
        return (self.text, self.tool_call_id or "", *calls)


class FunctionTool(Wire):
    """A function that a model may call; `parameters` is the JSON schema of its arguments, as JSON text."""

    name: ToolName
    description: str | None = Field(default=None, repr=False)
    parameters: str | None = Field(default=None, repr=False)

    @field_validator("parameters")
    @classmethod
    def _is_schema(cls, value: str | None) -> str | None:
        try:
            schema = None if value is None else json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the parameters are no JSON that can be read: {error}") from error
        if schema is not None and not isinstance(schema, dict):
            raise ValueError("parameters are a JSON schema of type object, such as {'type': 'object', ...}")
        return value


class NamedTool(Wire):
    """The one tool that must be called."""

    name: ToolName


ToolChoice = Literal["auto", "none", "required"] | NamedTool


def check_tools(tools: tuple[FunctionTool, ...] | None, choice: ToolChoice | None) -> None:
    """Raise ValueError where `tools` are too much, or `choice` does not fit them."""
    names = [tool.name for tool in tools or ()]
    if tools is None and choice not in (None, "none"):
        raise ValueError("tool_choice is given without tools")
    if len(set(names)) < len(names):
        raise ValueError("two tools have the same name")
    if isinstance(choice, NamedTool) and choice.name not in names:
        raise ValueError(f"tool_choice names {choice.name!r}, which is not among the tools: {', '.join(names)}")
    texts = [text for tool in tools or () for text in (tool.name, tool.description or "", tool.parameters or "")]
    count_characters("tools", MAX_TOOL_CHARS, *texts)
    for text in texts:
        check_unicode(text, "a tool's description or schema")


def tool_fields(given: object) -> Mapping[str, object]:
    """One tool as a caller gives it, OpenAI's {"type": "function", "function": {...}}, as the fields of a FunctionTool.

    Raises:
        ValueError: it is not of that shape.
    """
    if isinstance(given, FunctionTool):
        return given.model_dump()
    form = "use {'type': 'function', 'function': {'name': ..., 'description': ..., 'parameters': {...}}}"
    if not isinstance(given, Mapping) or given.get("type") != "function" or set(given) != {"type", "function"}:
        raise ValueError(f"it is not a function tool; {form}")
    function = given["function"]
    if not isinstance(function, Mapping):
        raise ValueError(f"its function is of type {type(function).__name__}; {form}")
    fields = {str(key): value for key, value in function.items()}
    if fields.pop("strict", None) not in (None, False):
        raise ValueError(
            "strict cannot be promised while the model may also answer in text; leave it out, and use "
            "tool_choice='required' or a named tool: then calls keep to their schemas"
        )
    parameters = fields.get("parameters")
    if parameters is not None:
        fields["parameters"] = _written("parameters", parameters)
    return fields


def choice_fields(given: object) -> object:
    """A tool_choice as a caller gives it, with OpenAI's {"type": "function", "function": {"name": ...}} for one tool.

    Raises:
        ValueError: it is not of a known form.
    """
    if given is None or isinstance(given, NamedTool) or given in ("auto", "none", "required"):
        return given
    function = given.get("function") if isinstance(given, Mapping) and given.get("type") == "function" else None
    if isinstance(function, Mapping) and set(function) == {"name"} and isinstance(function["name"], str):
        return {"name": function["name"]}
    raise ValueError("use 'auto', 'none', 'required' or {'type': 'function', 'function': {'name': ...}}")


def message_fields(given: Mapping[str, object]) -> dict[str, object]:
    """One message as a caller gives it, as the fields of a ChatMessage: calls in a tuple, arguments as JSON text."""
    fields: dict[str, object] = dict(given)
    calls = fields.get("tool_calls")
    if isinstance(calls, list | tuple):
        fields["tool_calls"] = tuple(_call_fields(call) for call in calls) or None
    return fields


def _call_fields(call: object) -> object:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = dict(call["function"])
    if isinstance(function.get("arguments"), Mapping):
        function["arguments"] = _written("arguments", function["arguments"])
    return {**call, "function": function}


def _written(what: str, value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the {what} cannot be written as JSON: {error}") from error
