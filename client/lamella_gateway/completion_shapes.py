"""What completions send back: whole, and in chunks, which differ only in what is not there yet."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from lamella_gateway.chat_shapes import UsageBody
from lamella_gateway.logprobs import CompletionLogprobs


class CompletionChoiceBody(TypedDict):
    """One of the texts, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionBody(TypedDict):
    """Texts gone on with."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoiceBody]
    usage: NotRequired[UsageBody | None]
