"""Vectors of texts in place of an answer: the request, the event that brings them, and what a caller gets.

Owns the types and their bounds. The vectors of a job come in one event, as base64 of float32, because a reader wants
all of them or none. Neighbours: `messages` (which decodes requests and events), `completion` (which gathers events).
"""

from __future__ import annotations

import base64
import binascii
from array import array
from dataclasses import dataclass
from sys import byteorder
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from lamella.wire import MAX_PROMPT_CHARS, Wire, check_unicode, count_characters

if TYPE_CHECKING:
    from lamella.messages import Usage

MAX_TEXTS = 2048
MAX_VALUES_CHARS = 4 * 2**20  # 3 MiB of numbers as base64
_BYTES = 4  # of a number

Pooling = Literal["mean", "last"]


class EmbedRequest(Wire):
    """One job of embeddings: hidden states after the model's last norm, pooled over each text's tokens."""

    version: Literal[2] = 2
    kind: Literal["embed"] = "embed"
    model: str
    texts: tuple[str, ...] = Field(min_length=1, max_length=MAX_TEXTS, repr=False)
    pooling: Pooling = "mean"
    normalised: bool = True

    @field_validator("texts")
    @classmethod
    def _are_texts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        count_characters("texts", MAX_PROMPT_CHARS, *value)
        for place, text in enumerate(value):
            if not text:
                raise ValueError(f"text {place} is empty; give at least one character")
            check_unicode(text, f"text {place}")
        return value

    @property
    def needs_schema(self) -> int:
        """The oldest schema whose workers read it."""
        return self.version


class EmbeddingsEvent(Wire):
    """The vectors of all texts, in order: `values` is base64 of float32 [count, width], little-endian."""

    type: Literal["embeddings"] = "embeddings"
    count: int = Field(ge=1, le=MAX_TEXTS)
    width: int = Field(ge=1)
    values: str = Field(max_length=MAX_VALUES_CHARS, repr=False)

    @model_validator(mode="after")
    def _is_whole(self) -> EmbeddingsEvent:
        try:
            size = len(base64.b64decode(self.values, validate=True))
        except (binascii.Error, ValueError) as error:
            raise ValueError("the vectors are not base64") from error
        if size != self.count * self.width * _BYTES:
            raise ValueError(f"{size} bytes are not {self.count} vectors of {self.width} numbers")
        return self

    @property
    def vectors(self) -> tuple[tuple[float, ...], ...]:
        """The vectors as numbers."""
        numbers = array("f", base64.b64decode(self.values))
        if byteorder == "big":
            numbers.byteswap()
        return tuple(tuple(numbers[at : at + self.width]) for at in range(0, len(numbers), self.width))


@dataclass(frozen=True)
class Embeddings:
    """What a job of embeddings brought.

    Attributes:
        job_id: the job.
        vectors: one for each text, in order.
        usage: what it cost; `prompt_tokens` counts the tokens of all texts.
    """

    job_id: str
    vectors: tuple[tuple[float, ...], ...]
    usage: Usage
