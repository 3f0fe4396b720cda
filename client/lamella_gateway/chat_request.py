"""What ``POST /v1/chat/completions`` takes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lamella_gateway.answer_format import ChatFormat
from lamella_gateway.message_text import MOST_MESSAGES, TURN_WHY, ChatTurn
from lamella_gateway.request_base import ChoiceFields, Metadata, Nothing, ServiceTier, Text
from lamella_gateway.tool_request import WHY_CHOICE, WHY_TOOLS, ChatChoice, ChatTools, Mode, ToolTerms, tool_terms


class ChatRequest(ChoiceFields):
    """A chat to be answered; `max_tokens` is the old name of `max_completion_tokens`."""

    WHY: ClassVar[dict[str, str]] = {
        **TURN_WHY,
        "logit_bias": "Give token ids as text, each with a number from -100 to 100",
        "tools": WHY_TOOLS,
        "tool_choice": WHY_CHOICE,
        "functions": "Functions are given as tools",
        "function_call": "Use tool_choice",
        "response_format": "The formats served are text, json_object and json_schema",
        "modalities": "Text is the only modality",
        "audio": "Text is the only modality",
        "prediction": "Predicted outputs are not served",
        "web_search_options": "The web is not searched here",
        "moderation": "Nothing is moderated here",
        "store": "Chats are not stored; POST /v1/responses stores what it answers",
        "reasoning_effort": "The effort cannot be chosen",
        "verbosity": "The verbosity cannot be chosen; ask for it in the prompt",
        "service_tier": "auto and default wait as normal jobs, flex as low ones",
        "stream_options": "Only include_usage can be asked for",
    }

    messages: Annotated[tuple[ChatTurn, ...], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    service_tier: ServiceTier | None = None
    response_format: ChatFormat | None = None
    tools: ChatTools | None = None
    tool_choice: Mode | ChatChoice | None = None
    parallel_tool_calls: bool | None = None
    # Accepted, and without effect: they name, trace or cache, and change no answer.
    metadata: Metadata | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    prompt_cache_options: dict[str, object] | None = None
    # Accepted with the values that change nothing.
    store: Literal[False] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[tuple[Literal["text"], ...], Field(max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    moderation: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give max_completion_tokens alone")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        _ = self.tool_terms  # they fit together, or it raises
        if not any(turn.message().content for turn in self.messages):
            raise ValueError("messages: the chat has no text; give at least one message with content")
        return self

    @property
    def tool_terms(self) -> ToolTerms:
        """What the queue is told of tools."""
        return tool_terms(self.tools, self.tool_choice)

    @property
    def limit(self) -> int | None:
        """How many tokens the answer may have, None if the request does not say."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to tell for each token; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
