"""What chat sends back: whole, and in chunks.

Owns the JSON of ``chat.completion`` and ``chat.completion.chunk``; the types are also what ``/openapi.json`` says.
"""

from __future__ import annotations

import json
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from lamella import TokenLogprob, Usage
from lamella.tool_calls import CallDelta
from lamella_gateway.answer import Answer
from lamella_gateway.logprobs import ChatLogprob, chat_logprobs

FinishReason = Literal["stop", "length", "tool_calls"]


class UsageBody(TypedDict):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class LogprobsBody(TypedDict):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatLogprob]
    refusal: None


class FunctionBody(TypedDict):
    """Which function is called, and its arguments as JSON text."""

    name: str
    arguments: str


class CallBody(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionBody


class MessageBody(TypedDict):
    """An answer; without text where it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[CallBody]]


class ChatChoiceBody(TypedDict):
    """One of the answers."""

    index: int
    message: MessageBody
    logprobs: LogprobsBody | None
    finish_reason: FinishReason


class ChatBody(TypedDict):
    """A chat's answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoiceBody]
    usage: UsageBody
    service_tier: NotRequired[str]
    system_fingerprint: str


class DeltaBody(TypedDict, total=False):
    """What a chunk adds to an answer."""

    role: Literal["assistant"]
    content: str
    tool_calls: list[dict[str, object]]


def message_body(answer: Answer) -> MessageBody:
    """Return an answer as a message."""
    calls = [
        CallBody(id=call.call_id, type="function", function=FunctionBody(name=call.name, arguments=call.arguments))
        for call in answer.calls
    ]
    if not calls:
        return MessageBody(role="assistant", content=answer.text, refusal=None)
    return MessageBody(role="assistant", content=answer.text or None, refusal=None, tool_calls=calls)


def usage_body(each: list[Usage], *, shares_prompt: bool) -> UsageBody:
    """Return the sum of what jobs cost; a prompt that all of them share counts once, as OpenAI counts it."""
    prompts = [usage.prompt_tokens for usage in each]
    prompt = max(prompts, default=0) if shares_prompt else sum(prompts)
    completion = sum(usage.completion_tokens for usage in each)
    return UsageBody(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def logprobs_body(positions: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> LogprobsBody:
    """Return log-probabilities as chat shows them."""
    return LogprobsBody(content=chat_logprobs(positions), refusal=None)


class ChunkWriter:
    """Writes the chunks of one chat; what all of them share is written once.

    Args:
        envelope: the fields that every chunk has.
        tells_usage: whether the last chunk is to tell the usage, which the others then have as null.
    """

    def __init__(self, envelope: dict[str, str | int], *, tells_usage: bool) -> None:
        tail = ',"usage":null' if tells_usage else ""
        self._start = "data: " + json.dumps(envelope, separators=(",", ":"))[:-1] + ',"choices":['
        self._end = f"]{tail}}}\n\n"

    def role(self, index: int) -> bytes:
        """Return a choice's first chunk."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def text(self, index: int, text: str, positions: tuple[TokenLogprob, ...] | None = None) -> bytes:
        """Return a chunk of text."""
        return self._chunk(index, {"content": text}, None, positions)

    def call(self, index: int, delta: CallDelta) -> bytes:
        """Return a chunk of a call: the first one has its id and name."""
        call: dict[str, object] = {"index": delta.index}
        if delta.id is not None:
            call |= {"id": delta.id, "type": "function"}
        name = {} if delta.name is None else {"name": delta.name}
        call["function"] = {**name, "arguments": delta.arguments}
        return self._chunk(index, {"tool_calls": [call]}, None)

    def finish(self, index: int, reason: FinishReason) -> bytes:
        """Return a choice's last chunk."""
        return self._chunk(index, {}, reason)

    def usage(self, usage: UsageBody) -> bytes:
        """Return the chunk with the usage, which has no choice."""
        return f'{self._start}],"usage":{json.dumps(usage)}}}\n\n'.encode()

    def _chunk(
        self,
        index: int,
        delta: DeltaBody,
        reason: FinishReason | None,
        positions: tuple[TokenLogprob, ...] | None = None,
    ) -> bytes:
        told = "null" if positions is None else json.dumps(logprobs_body(positions))
        ended = "null" if reason is None else f'"{reason}"'
        choice = f'{{"index":{index},"delta":{json.dumps(delta)},"logprobs":{told},"finish_reason":{ended}}}'
        return f"{self._start}{choice}{self._end}".encode()
