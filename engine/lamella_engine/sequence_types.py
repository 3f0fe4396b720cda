"""What goes into the engine and what comes out: plain frozen data, no torch.

The worker, the tests and `AutoModel` all speak to the engine in these types only, so that the engine can move to
another process without its callers noticing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from lamella_engine.timeline import StreamTotals


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # end token, stop string or stop id
    LENGTH = "length"  # max_tokens or the context's end
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; same meaning and defaults as the wire's SamplingParams.

    `seed` must be set where `temperature` > 0: the draw at a position is a function of (seed, position) alone.
    `logprobs` is the number of alternatives reported per position (0: the chosen token only), None for none; they are
    the model's own, before penalties, `logit_bias` (token id, what is added to its logit) and masks.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None


class FormatKind(StrEnum):
    """How a format says what an answer looks like."""

    JSON_OBJECT = "json_object"  # any JSON object; no source
    JSON_SCHEMA = "json_schema"  # a JSON schema as JSON
    REGEX = "regex"  # a regular expression that the whole answer matches
    CHOICE = "choice"  # one of the texts of a JSON list
    LARK = "lark"  # a grammar in llguidance's variant of Lark


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer must look like; `source` as its kind has it."""

    kind: FormatKind
    source: str = ""


@dataclass(frozen=True)
class ToolChat:
    """A chat that only a template with tools can render; JSON text of what such templates take.

    `messages` is the list of messages, `tools` the list of tools that may be called (None: none). With one tool named
    in `must_call` the answer is one call of it, with several it is calls of them; with none the model chooses.
    """

    messages: str
    tools: str | None = None
    must_call: tuple[str, ...] = ()


class ToolFormat(StrEnum):
    """How a model writes calls of tools."""

    HERMES = "hermes"  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    LLAMA3 = "llama3"  # {"name": ..., "parameters": {...}}
    MISTRAL = "mistral"  # [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
    MISTRAL_ARGS = "mistral_args"  # [TOOL_CALLS]name[ARGS]{...}


class Pooling(StrEnum):
    """Which hidden states stand for a text."""

    MEAN = "mean"  # the mean of all tokens'
    LAST = "last"  # the last token's


@dataclass(frozen=True)
class EmbeddingTerms:
    """Texts of which vectors are wanted in place of an answer: hidden states after the last norm, pooled."""

    texts: tuple[str, ...]
    pooling: Pooling = Pooling.MEAN
    is_normalised: bool = True


@dataclass(frozen=True)
class SequenceRequest:
    """One sequence: exactly one of `prompt_ids`, `prompt` (raw text), `messages` (role, content pairs), `tool_chat`, or
    `embedding`, for which nothing else matters.

    `generated_ids` are tokens drawn in an earlier life of the sequence: they are prefilled after the prompt, count
    against `max_tokens`, and no event is made for them again. `num_samples` continuations of the prompt run side by
    side, each with a random stream and an end of its own; the first one is what a request of one sample would get.
    With an `answer_format` no other answer can come; it ends where nothing may follow.
    """

    sequence_id: str
    sampling: Sampling = field(default_factory=Sampling)
    prompt_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    generated_ids: tuple[int, ...] = ()
    num_samples: int = 1
    answer_format: AnswerFormat | None = None
    tool_chat: ToolChat | None = None
    embedding: EmbeddingTerms | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probability of the chosen token, and of the most likely ones as (token id, logprob).

    `text` and `top_texts` are the texts of these tokens, each by itself; None and empty where there is no tokenizer.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    text: str | None = None
    top_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class SequenceTokens:
    """The tokens one sweep brought to one sample of a sequence: the one chosen, and those its format leaves no choice
    about.

    `position` counts generated tokens from 0 and is the index of ``token_ids[0]``; `text` is what the tokens add to
    the visible text (empty while a character or a possible stop string is incomplete). `tool_format`, where tools are
    offered and `position` is 0, says how this model writes calls.
    """

    sequence_id: str
    position: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None = None
    sample: int = 0
    tool_format: ToolFormat | None = None


@dataclass(frozen=True)
class SequencePrefill:
    """A sweep read part of a sequence's prompt, which its samples share, and brought no token yet."""

    sequence_id: str
    prefilled_tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class SequenceFinished:
    """The last event of one sample of a sequence. `error_code` and `error` are set where the reason is ERROR.

    `sweeps` are those the sequence rode in this life, `streamed_bytes` the weight bytes those sweeps moved.
    """

    sequence_id: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    sweeps: int
    streamed_bytes: int
    run_s: float
    error_code: str | None = None
    error: str | None = None
    sample: int = 0


@dataclass(frozen=True)
class SequenceEmbeddings:
    """What a request for embeddings brought, at once: `values` is base64 of float32 [count, width], little-endian."""

    sequence_id: str
    count: int
    width: int
    values: str


SequenceEvent = SequenceTokens | SequencePrefill | SequenceEmbeddings | SequenceFinished


@dataclass(frozen=True)
class SweepEvents:
    """Everything one sweep produced, for all sequences that rode it, in order; at most one SequenceTokens a sample.

    `sweep_seconds` has how long each sweep took since the batch before: this one's, and any that brought no event.
    """

    events: tuple[SequenceEvent, ...]
    sweep_seconds: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineCounters(StreamTotals):
    """Totals since the engine opened; `last_sweep_at` is Unix seconds, None before the first sweep.

    `streamed_bytes` are those that moved to where they were computed. `preemptions` counts sequences that were sent
    back to wait because the key-value cache, or memory, ran short; `out_of_memory` counts sweeps that failed because
    memory was short, and `batch_limit` is how many sequences may run side by side since (0: not told). `kv_blocks` are
    all pages of the key-value cache, `kv_blocks_used` those that sequences hold now. On a GPU the stream's totals are
    behind by one sweep.
    """

    running: int
    waiting: int
    sweeps: int
    tokens: int
    streamed_bytes: int
    peak_rss_bytes: int
    last_sweep_at: float | None
    preemptions: int = 0
    out_of_memory: int = 0
    batch_limit: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0


@dataclass(frozen=True)
class PlanFacts:
    """A plan in figures: layers and bytes (with a streamed head) that wait in each tier, and what is beside them.

    `limit_s` is what a sweep of one token takes at best by the plan's own prediction; `is_limit_measured` says that the
    prediction rests on what was measured here, which is not done for small models. `vram_bytes` and `ram_bytes` are
    budgets, `vram_bytes` None on a CPU.
    """

    layers_in_vram: int
    layers_in_ram: int
    layers_on_disk: int
    bytes_in_vram: int
    bytes_in_ram: int
    bytes_on_disk: int
    kv_tokens: int
    kv_bytes: int
    sweep_tokens: int
    vram_bytes: int | None
    ram_bytes: int
    limit_s: float
    is_limit_measured: bool


@dataclass(frozen=True)
class EngineFacts:
    """What the open engine is: the model as served, the device it runs on, and the plan (None: there is none)."""

    model: str
    family: str
    dtype: str
    device: str
    num_layers: int
    context_length: int
    size_bytes: int
    max_sequences: int
    plan: PlanFacts | None = None
