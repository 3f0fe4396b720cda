"""Messages as clients send them, as the queue takes them: content in parts becomes text, developer becomes system.

Owns what a message may hold in chat and in responses. Parts that are no text are refused by name.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lamella import ChatMessage
from lamella.chat import MAX_CALLS, MAX_ID_CHARS, FunctionCall, ToolCall
from lamella.messages import MAX_CHAT_MESSAGES, MAX_PROMPT_CHARS
from lamella_gateway.request_base import RequestBase
from lamella_gateway.tool_request import FunctionName

Content = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
CallId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
MOST_MESSAGES = MAX_CHAT_MESSAGES


class TextPart(RequestBase):
    """A part of a message; text is the only kind."""

    WHY: ClassVar[dict[str, str]] = {"type": "Text is the only kind of content that is served"}

    type: Literal["text", "input_text", "output_text"]
    text: Content
    annotations: list[object] | None = None  # responses put them into what they return
    logprobs: list[object] | None = None


Parts = Annotated[tuple[TextPart, ...], Field(max_length=10_000)]


class TurnFunction(RequestBase):
    """The function that was called, and its arguments as JSON text."""

    name: FunctionName
    arguments: Content


class TurnCall(RequestBase):
    """One call that an assistant made."""

    id: CallId
    type: Literal["function"] = "function"
    function: TurnFunction
    index: int | None = None  # clients that gather a stream leave it in

    def call(self) -> ToolCall:
        """Return it as the queue takes it."""
        return ToolCall(id=self.id, function=FunctionCall(name=self.function.name, arguments=self.function.arguments))


class ChatTurn(RequestBase):
    """One message of a chat; an assistant's message may be what a client got from here, as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | Parts | None = None
    name: None = None
    refusal: Literal[""] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[tuple[TurnCall, ...], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: CallId | None = None
    annotations: list[object] | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatTurn:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to an assistant's message")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a tool's message, and no other, has a tool_call_id: that of the call it answers")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; only an assistant's message with tool_calls needs none")
        return self

    def message(self) -> ChatMessage:
        """Return it as the queue takes it."""
        calls = tuple(call.call() for call in self.tool_calls or ()) or None
        return turn(self.role, self.content, calls, self.tool_call_id)


TURN_WHY = {
    "messages": "Roles are system, developer, user, assistant and tool, content is text; names are not rendered"
}


def turn(
    role: Literal["system", "developer", "user", "assistant", "tool"],
    content: str | tuple[TextPart, ...] | None,
    calls: tuple[ToolCall, ...] | None = None,
    call_id: str | None = None,
) -> ChatMessage:
    """Return a message of the queue; parts are joined without anything between them."""
    text = "".join(part.text for part in content) if isinstance(content, tuple) else content
    return ChatMessage(
        role="system" if role == "developer" else role, content=text, tool_calls=calls, tool_call_id=call_id
    )
