"""What the input of a response may consist of: messages, calls of tools, and what the calls brought.

Owns how such a list becomes the messages of a chat: calls belong to the assistant's message before them. Items of an
earlier response's output may be given as they are. Neighbours: `response_request`, `message_text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AliasChoices, Discriminator, Field, Tag

from lamella import ChatMessage
from lamella.chat import MAX_CALLS, FunctionCall, ToolCall
from lamella_gateway.api_error import ApiError
from lamella_gateway.message_text import CallId, Content, Parts, turn
from lamella_gateway.request_base import RequestBase, Text
from lamella_gateway.tool_request import FunctionName


class InputMessage(RequestBase):
    """One message of the input; an output message of an earlier response may be given as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | Parts
    type: Literal["message"] | None = None
    id: Text | None = None
    status: Text | None = None
    phase: Text | None = None


class InputCall(RequestBase):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: Content
    id: Text | None = None
    status: Text | None = None
    async_: Literal[False] | None = Field(default=None, validation_alias=AliasChoices("async", "async_"))
    caller: None = None
    namespace: None = None


class InputCallOutput(RequestBase):
    """What a call brought."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Content | Parts
    id: Text | None = None
    status: Text | None = None
    name: FunctionName | None = None
    caller: None = None
    namespace: None = None


def _kind(item: object) -> str:
    kind = item.get("type") if isinstance(item, Mapping) else getattr(item, "type", None)
    return kind if kind in ("function_call", "function_call_output") else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")],
    Discriminator(_kind),
]


def input_messages(items: Sequence[InputMessage | InputCall | InputCallOutput]) -> list[ChatMessage]:
    """Return the items as messages of a chat.

    Raises:
        ApiError: more calls follow each other than one message may have.
    """
    messages: list[ChatMessage] = []
    for item in items:
        match item:
            case InputMessage(role=role, content=content):
                messages.append(turn(role, content))
            case InputCall():
                messages.append(_called(messages, item))
            case InputCallOutput(call_id=call_id, output=output):
                messages.append(turn("tool", output, None, call_id))
    return messages


def _called(messages: list[ChatMessage], item: InputCall) -> ChatMessage:
    """The assistant's message with the call in it, in place of the last message if that is the assistant's."""
    call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
    if not messages or messages[-1].role != "assistant":
        return turn("assistant", None, (call,))
    before = messages.pop()
    calls = (*(before.tool_calls or ()), call)
    if len(calls) > MAX_CALLS:
        raise ApiError(400, f"more than {MAX_CALLS} calls follow each other", param="input", code="invalid_value")
    return turn("assistant", before.content, calls)
