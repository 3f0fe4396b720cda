"""What ``POST /v1/completions`` takes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lamella.messages import MAX_PROMPT_CHARS
from lamella_gateway.request_base import ChoiceFields

DEFAULT_TOKENS = 16
MOST_CHOICES = 64
Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]


class CompletionRequest(ChoiceFields):
    """A text to be gone on with, or several."""

    WHY: ClassVar[dict[str, str]] = {
        "prompt": "Give text, or a list of texts; token ids are not taken",
        "echo": "The prompt is not repeated; put it before the answer yourself",
        "suffix": "Text in the middle is not filled in",
        "best_of": "Choices are not ranked; ask for n of them",
        "logit_bias": "Give token ids as text, each with a number from -100 to 100",
        "stream_options": "Only include_usage can be asked for",
    }

    prompt: Prompt | Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=MOST_CHOICES)]
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1, le=16)
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: choices are not ranked; leave it out, and ask for n of them")
        if len(self.prompts) * (self.n or 1) > MOST_CHOICES:
            raise ValueError(f"n: {len(self.prompts)} prompts times n are more than {MOST_CHOICES} choices")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts to go on with."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt
