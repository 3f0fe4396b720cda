"""What ``POST /v1/responses`` takes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lamella.messages import MAX_PROMPT_CHARS
from lamella_gateway.answer_format import AnyFormat, ResponseFormat
from lamella_gateway.input_item import InputItem
from lamella_gateway.message_text import MOST_MESSAGES, Content
from lamella_gateway.request_base import Metadata, Nothing, RequestBase, SamplingFields, ServiceTier, Text
from lamella_gateway.tool_request import (
    WHY_CHOICE,
    WHY_TOOLS,
    Mode,
    ResponseChoice,
    ResponseTools,
    ToolTerms,
    tool_terms,
)

LOGPROBS = "message.output_text.logprobs"


class TextConfig(RequestBase):
    """How the answer is to look."""

    format: ResponseFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(RequestBase):
    """Nothing can be chosen."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(SamplingFields):
    """An input to be answered, now or in the background."""

    WHY: ClassVar[dict[str, str]] = {
        "input": "Give text, or messages of role system, developer, user or assistant whose content is text, and calls "
        "with their outputs",
        "tools": WHY_TOOLS,
        "tool_choice": WHY_CHOICE,
        "conversation": "Conversations are not kept; use previous_response_id",
        "prompt": "Prompt templates are not kept",
        "reasoning": "Reasoning cannot be configured",
        "text": "The formats served are text, json_object and json_schema",
        "truncation": "A prompt that is too long is refused, never cut",
        "include": f"What can be included is {LOGPROBS}",
        "context_management": "The context is not managed",
        "moderation": "Nothing is moderated here",
        "image": "Text is the only modality",
        "access_programs": "Not served",
        "background_options": "Nothing can be chosen for background responses",
        "service_tier": "auto and default wait as normal jobs, flex as low ones",
    }

    input: (
        Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
        | Annotated[tuple[InputItem, ...], Field(min_length=1, max_length=MOST_MESSAGES)]
    )
    instructions: Content | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    previous_response_id: Text | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    include: Annotated[tuple[Literal["message.output_text.logprobs"], ...], Field(max_length=4)] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    service_tier: ServiceTier | None = None
    tools: ResponseTools | None = None
    tool_choice: Mode | ResponseChoice | None = None
    parallel_tool_calls: bool | None = None
    # Accepted, and without effect.
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    prompt_cache_options: dict[str, object] | None = None
    # Accepted with the values that change nothing.
    stream_options: ResponseStreamOptions | None = None
    max_tool_calls: int | None = Field(default=None, ge=1)
    text: TextConfig | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: None = None
    conversation: None = None
    prompt: None = None
    context_management: Nothing | None = None
    moderation: None = None
    image: None = None
    access_programs: None = None
    background_options: None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ResponseRequest:
        if self.background and self.store is False:
            raise ValueError("store: a background response has to be stored; leave store out")
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            raise ValueError(f"top_logprobs needs include: ['{LOGPROBS}']")
        _ = self.tool_terms  # they fit together, or it raises
        return self

    @property
    def tool_terms(self) -> ToolTerms:
        """What the queue is told of tools."""
        return tool_terms(self.tools, self.tool_choice)

    @property
    def format(self) -> AnyFormat | None:
        """How the answer is to look, None if the request does not say."""
        return None if self.text is None else self.text.format

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to tell for each token; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None
