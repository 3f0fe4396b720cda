"""Messages as clients send them, as the queue takes them: content in parts becomes text, developer becomes system.

Owns what a message may hold in chat and in responses. Parts that are no text are refused by name.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lamella import ChatMessage
from lamella.messages import MAX_CHAT_MESSAGES, MAX_PROMPT_CHARS
from lamella_gateway.request_base import NO_TOOLS, Nothing, RequestBase

Content = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
MOST_MESSAGES = MAX_CHAT_MESSAGES


class TextPart(RequestBase):
    """A part of a message; text is the only kind."""

    WHY: ClassVar[dict[str, str]] = {"type": "Text is the only kind of content that is served"}

    type: Literal["text", "input_text", "output_text"]
    text: Content
    annotations: list[object] | None = None  # responses put them into what they return
    logprobs: list[object] | None = None


Parts = Annotated[tuple[TextPart, ...], Field(max_length=10_000)]


class ChatTurn(RequestBase):
    """One message of a chat; an assistant's message may be what a client got from here, as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | Parts
    name: None = None
    refusal: Literal[""] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None
    annotations: list[object] | None = None

    def message(self) -> ChatMessage:
        """Return it as the queue takes it."""
        return turn(self.role, self.content)


TURN_WHY = {
    "messages": f"Roles are system, developer, user and assistant, content is text; names are not rendered. {NO_TOOLS}"
}


def turn(role: Literal["system", "developer", "user", "assistant"], content: str | tuple[TextPart, ...]) -> ChatMessage:
    """Return a message of the queue; parts are joined without anything between them."""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return ChatMessage(role="system" if role == "developer" else role, content=text)
