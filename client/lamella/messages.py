"""Every message that crosses Redis, as frozen types: requests in, stream events and status out.

Owns the shapes and their validation; knows nothing of keys, scripts or connections. Both ends decode with these
types, so a message that decodes is a message that is valid. Parts of requests that have rules of their own are in
`chat`, `response_format` and `embedding`. A job's life on the wire is

    GenerateRequest -> TokenEvent, TokenEvent, ... -> exactly one of Done | Failed | Cancelled
    EmbedRequest    -> EmbeddingsEvent, if it is done -> the same

Stream events carry no sequence number themselves: it is the id of their stream entry (``<seq>-0``) and the prefix of
their published form (``<seq> <json>``), so that there is one place it can come from.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from lamella.chat import MAX_TOOLS, FunctionTool, ToolChoice, check_tools
from lamella.chat import ChatMessage as ChatMessage
from lamella.embedding import EmbeddingsEvent, EmbedRequest
from lamella.errors import DecodeError
from lamella.response_format import ResponseFormat
from lamella.stored_model import StoredModelInfo
from lamella.wire import MAX_PROMPT_CHARS as MAX_PROMPT_CHARS
from lamella.wire import MAX_TOKEN_ID, TokenId, check_unicode, count_characters
from lamella.wire import Wire as Wire

SCHEMA_VERSION = 2  # the newest this version reads; a job is marked with the oldest that reads it
MAX_CHAT_MESSAGES = 100_000
MAX_REQUEST_CHARS = 6 * MAX_PROMPT_CHARS + 8_000_000  # as JSON, where a character may take six
MAX_EVENT_CHARS = 16_000_000
MAX_HEARTBEAT_CHARS = 100_000
MAX_TOKENS_LIMIT = 1_000_000
MAX_BIASES = 300

_MODEL_NAME = re.compile(
    r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[0-9a-f]{7,64})?(~[a-z0-9][a-z0-9-]*)?\Z", re.ASCII
)


def check_model_name(name: str) -> str:
    """Return `name` if it is a model name: ``name``, ``owner/name`` or either with ``@revision`` (hex, 7-64).

    Raises:
        ValueError: the name could mean a path outside the store, or is not of that form.
    """
    if len(name) > 200 or ".." in name or not _MODEL_NAME.match(name):
        raise ValueError(
            f"{name[:80]!r} is not a model name; use 'name', 'owner/name' or 'owner/name@revision' "
            "made of letters, digits, '.', '_' and '-'"
        )
    return name


class JobState(StrEnum):
    """Where a job stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """True once nothing more will happen to the job."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class Priority(StrEnum):
    """Classes of jobs: a higher one goes first, but of 17 jobs at least one is of each class that waits."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def rank(self) -> int:
        """0 for the class that goes first."""
        return list(Priority).index(self)

    @classmethod
    def of_rank(cls, rank: int) -> Priority:
        """Return the class of a rank; raises IndexError."""
        return list(cls)[rank]


class SamplingParams(Wire):
    """How tokens are chosen; the defaults are greedy decoding.

    `seed` fixes the random draw of every position, so that a resumed or batched job draws the same tokens; the client
    fills in a random one when it is None and `temperature` > 0. Penalties follow transformers (repetition) and the
    OpenAI API (presence, frequency: over generated tokens only). `logit_bias` adds to the logits of tokens, as (id,
    -100 to 100).
    """

    max_tokens: int = Field(default=256, ge=1, le=MAX_TOKENS_LIMIT)
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    top_k: int | None = Field(default=None, ge=1, le=MAX_TOKEN_ID)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...] = Field(default=(), max_length=16)
    stop_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=64)
    ignore_eos: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    logit_bias: tuple[tuple[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]], ...] | None = Field(
        default=None, min_length=1, max_length=MAX_BIASES
    )

    @field_validator("stop")
    @classmethod
    def _stop_is_text(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            check_unicode(text, "a stop string")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _names_tokens_once(cls, value: tuple[tuple[int, float], ...] | None) -> tuple[tuple[int, float], ...] | None:
        if value is not None and len({token_id for token_id, _ in value}) < len(value):
            raise ValueError("a token has two biases")
        return value


class GenerateRequest(Wire):
    """One generation job: exactly one of `prompt` (raw text) and `messages` (chat)."""

    version: Literal[1] = 1
    kind: Literal["generate"] = "generate"
    model: str
    prompt: str | None = Field(default=None, max_length=MAX_PROMPT_CHARS, repr=False)
    messages: tuple[ChatMessage, ...] | None = Field(default=None, max_length=MAX_CHAT_MESSAGES, repr=False)
    sampling: SamplingParams = SamplingParams()
    response_format: ResponseFormat | None = None
    tools: tuple[FunctionTool, ...] | None = Field(default=None, min_length=1, max_length=MAX_TOOLS, repr=False)
    tool_choice: ToolChoice | None = None

    @property
    def needs_schema(self) -> int:
        """The oldest schema whose workers read it; older ones leave it alone."""
        has_news = self.response_format is not None or self.sampling.logit_bias is not None
        return 2 if has_news or self.concerns_tools or self.tool_choice is not None else 1

    @property
    def concerns_tools(self) -> bool:
        """Whether only a template that knows tools can render it."""
        return self.tools is not None or any(message.concerns_tools for message in self.messages or ())

    @field_validator("model")
    @classmethod
    def _model_name(cls, value: str) -> str:
        return check_model_name(value)

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt (raw text) and messages (chat)")
        if self.prompt is not None and not self.prompt:
            raise ValueError("the prompt is empty; give at least one character")
        if self.messages is not None and not any(message.content for message in self.messages):
            raise ValueError("the chat has no text; give at least one message with content")
        texts = [self.prompt or "", *(text for message in self.messages or () for text in message.texts)]
        count_characters("the chat", MAX_PROMPT_CHARS, *texts)
        for text in texts:
            check_unicode(text, "the prompt")
        return self

    @model_validator(mode="after")
    def _terms_fit(self) -> GenerateRequest:
        check_tools(self.tools, self.tool_choice)
        if self.tools is not None and self.messages is None:
            raise ValueError("tools need a chat: give messages in place of a prompt")
        if self.response_format is not None:
            if self.tools is not None and self.tool_choice != "none":
                raise ValueError("response_format and tools exclude each other; give one, or tool_choice='none'")
            if self.sampling.ignore_eos:
                raise ValueError("ignore_eos and response_format exclude each other: the format says where to end")
        if self.sampling.ignore_eos and self.tools is not None and self.tool_choice not in (None, "auto", "none"):
            raise ValueError("ignore_eos and a tool_choice that forces a call exclude each other")
        return self


class Usage(Wire):
    """What the job cost, counted once, in its terminal event.

    `sweeps` counts the sweeps the job rode; `streamed_bytes` the weight bytes those sweeps moved, shared with every
    job in the same sweeps. `run_s` is the time on the worker that finished the job.
    """

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    sweeps: int = Field(default=0, ge=0)
    streamed_bytes: int = Field(default=0, ge=0)
    run_s: float = Field(default=0.0, ge=0.0)


class TokenLogprob(Wire):
    """Log-probabilities (natural log, after temperature 1, before any filter) at one position.

    `text` is the token's own text, `top_texts` those of `top`; workers before this version tell neither.
    """

    token_id: TokenId
    logprob: float
    top: tuple[tuple[TokenId, float], ...] = ()
    text: str | None = Field(default=None, repr=False)
    top_texts: tuple[str, ...] = Field(default=(), repr=False)


ToolFormat = Literal["hermes", "llama3", "mistral", "mistral_args"]


class TokenEvent(Wire):
    """The tokens that one sweep brought to one job.

    `text` is what they add to the visible text; it is empty while a character or a possible stop string is incomplete.
    `tool_format`, of the first event of a job with tools, says how calls look in the text of this model.
    """

    type: Literal["token"] = "token"
    token_ids: tuple[TokenId, ...] = Field(repr=False)
    text: str = Field(repr=False)
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_format: ToolFormat | None = None


class Done(Wire):
    """The job ended as asked: `stop` (end token, stop string or stop id) or `length` (max_tokens or the context)."""

    type: Literal["done"] = "done"
    finish_reason: Literal["stop", "length"]
    usage: Usage


class Failed(Wire):
    """The job ended without a result; `message` says what, why and what to do."""

    type: Literal["failed"] = "failed"
    code: str
    message: str


class Cancelled(Wire):
    """The job was cancelled before its end."""

    type: Literal["cancelled"] = "cancelled"


class Progress(Wire):
    """Published, never stored: a sign of life while a long prompt is being read."""

    type: Literal["progress"] = "progress"
    prefilled_tokens: int = Field(ge=0)
    prompt_tokens: int = Field(ge=0)


TerminalEvent = Done | Failed | Cancelled
JobEvent = TokenEvent | EmbeddingsEvent | TerminalEvent  # what is stored
StreamEvent = JobEvent | Progress
JobRequest = Annotated[GenerateRequest | EmbedRequest, Field(discriminator="kind")]

_STREAM_EVENT: TypeAdapter[StreamEvent] = TypeAdapter(Annotated[StreamEvent, Field(discriminator="type")])
_REQUEST: TypeAdapter[GenerateRequest | EmbedRequest] = TypeAdapter(JobRequest)


def _check_length(raw: str | bytes, most: int, what: str) -> None:
    if len(raw) > most:
        raise DecodeError(f"{len(raw)} characters are too many for {what}; at most {most} are read")


def decode_event(raw: str | bytes) -> StreamEvent:
    """Decode one stream event from its JSON form.

    Raises:
        DecodeError: the text is not an event this version reads.
    """
    _check_length(raw, MAX_EVENT_CHARS, "a stream event")
    try:
        return _STREAM_EVENT.validate_json(raw, strict=True)
    except ValidationError as error:
        raise DecodeError(f"not a stream event of schema {SCHEMA_VERSION}: {error.errors()[0]['msg']}") from error


def decode_request(raw: str | bytes) -> GenerateRequest | EmbedRequest:
    """Decode a job's request from its JSON form.

    Raises:
        DecodeError: the text is not a request this version reads.
    """
    _check_length(raw, MAX_REQUEST_CHARS, "a request")
    try:
        return _REQUEST.validate_json(raw, strict=True)
    except ValidationError as error:
        raise DecodeError(f"not a request of schema {SCHEMA_VERSION}: {error.errors()[0]['msg']}") from error


class ModelInfo(Wire, extra="ignore"):
    """A model as a worker serves it; sizes in bytes, context in tokens.

    `slots` jobs of it run at once, and `running` do, on that worker or, where a client lists models, on all of them.
    """

    name: str
    family: str
    dtype: str
    num_layers: int
    context_length: int
    size_bytes: int
    slots: int = 0
    running: int = 0


class EngineProcessInfo(Wire, extra="ignore"):
    """The process that a worker's engine has of its own.

    `max_sequences` is the batch that its engine may run at most, `trouble` says why the last one before it ended.
    """

    pid: int | None
    state: Literal["starting", "ready", "failed"]
    restarts: int
    max_sequences: int
    trouble: str | None


class WorkerInfo(Wire, extra="ignore"):
    """A worker's heartbeat, written with a time to live; times are Unix seconds, counters since its start.

    `metrics_address` is where Prometheus finds the worker's metrics, as host:port, None where it serves none.
    `last_sweep_at` is None until the first job; while jobs run it is not before the first of them came, so a worker
    with running jobs and an old `last_sweep_at` is stuck. `engine_process` is None where the engine has no process of
    its own; `key_ids` names the worker's encryption keys. `model` is the first of `models`; slots, jobs and counters
    are of all of them together. An earlier worker tells `model` alone, so read `served`. `tier_bytes` are the weights
    that sweeps used, in bytes, of disk, RAM, VRAM; `memory_bytes` is the device's, `stored` the newest of its store.
    """

    name: str
    host: str
    pid: int
    version: str
    device: str
    model: ModelInfo
    slots: int
    running: int
    draining: bool
    started_at: float
    heartbeat_at: float
    last_sweep_at: float | None
    sweeps: int
    tokens: int
    streamed_bytes: int
    peak_rss_bytes: int
    engine_process: EngineProcessInfo | None = None
    metrics_address: str | None = None
    key_ids: tuple[str, ...] = ()
    tier_bytes: tuple[int, int, int] | None = None
    models: tuple[ModelInfo, ...] = ()
    memory_bytes: int | None = None
    stored: tuple[StoredModelInfo, ...] = Field(default=(), max_length=1000)

    @property
    def served(self) -> tuple[ModelInfo, ...]:
        """Every model that the worker serves, with its own slots and running jobs."""
        alone = self.model.model_copy(update={"slots": self.slots, "running": self.running})
        return self.models or (alone,)


class JobStatus(Wire):
    """A job's record as the client sees it; times are Unix seconds, `events` the highest sequence number emitted.

    `position` counts the jobs expected to start before it. It and the times of start and end are estimates, made when
    the status was asked for; `estimate` says from what. They are None in listings, and where nothing can be told.
    """

    job_id: str
    state: JobState
    model: str
    attempts: int
    events: int
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    worker: str | None = None
    cancel_requested: bool = False
    user: str | None = None
    priority: Priority = Priority.NORMAL
    deadline_at: float | None = None
    position: int | None = None
    estimated_start_at: float | None = None
    estimated_end_at: float | None = None
    estimate: str | None = None
    outcome: TerminalEvent | None = Field(default=None, discriminator="type")
