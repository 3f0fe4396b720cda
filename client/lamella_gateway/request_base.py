"""What all requests share: how fields are checked, sampling, and the values that fields of OpenAI may have here.

A field that OpenAI knows and Lamella does not serve is in the model with the values that change nothing (null, an empty
list), so that clients which always send it work; any other value is refused with the reason in WHY. Fields nobody
knows are refused by name. Neighbours: the modules ``*_request``, `body` (which words the errors).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from lamella import SamplingParams
from lamella.messages import MAX_BIASES

Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
]
Nothing = Annotated[list[object], Field(max_length=0)]
Text = Annotated[str, Field(max_length=1000)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
ServiceTier = Literal["auto", "default", "flex"]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
UserName = Annotated[str, Field(min_length=1, max_length=128)]

SEED_BITS = 63


class RequestBase(BaseModel):
    """Frozen, strict, and closed: an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    WHY: ClassVar[dict[str, str]] = {}


class SamplingFields(RequestBase):
    """Fields of chat, completions and responses that choose tokens; the last five are Lamella's own."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    user: UserName | None = None
    top_k: int | None = Field(default=None, ge=1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    stop_token_ids: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] | None = Field(default=None, max_length=64)
    ignore_eos: bool | None = None

    def base_sampling(self, max_tokens: int) -> SamplingParams:
        """Return how tokens are chosen; temperature and top_p are 1 unless given, as with OpenAI."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else self.seed % 2**SEED_BITS,
            top_k=self.top_k,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
        )


class StreamOptions(RequestBase):
    """What a stream brings besides its tokens; obfuscation pads nothing here, so it can only be left out."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChoiceFields(SamplingFields):
    """Fields that chat and completions share."""

    n: int | None = Field(default=None, ge=1, le=16)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    stop: StopText | Annotated[tuple[StopText, ...], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Biases | None = None

    def choice_sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """Return how the tokens of each choice are chosen."""
        biases = sorted((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items())
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return self.base_sampling(max_tokens).model_copy(
            update={
                "presence_penalty": self.presence_penalty or 0.0,
                "frequency_penalty": self.frequency_penalty or 0.0,
                "stop": stop,
                "logprobs": logprobs,
                "logit_bias": tuple(biases) or None,
            }
        )

    @property
    def wants_usage(self) -> bool:
        """Whether the stream is to end with its usage."""
        return bool(self.stream_options is not None and self.stream_options.include_usage)
