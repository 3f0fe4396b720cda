"""From a caller's arguments to a request: every mistake is named with the key, the value and the fix, nothing is sent.

Owns validation at the edge and the hash that an idempotency key stands for. Neighbours: `client` (which takes the
arguments), `submission` (which picks the model and sends the request).
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TypedDict

from pydantic import TypeAdapter, ValidationError

from lamella.answer_terms import AnswerTerms, checked_answer_terms, checked_messages
from lamella.chat import FunctionTool, NamedTool
from lamella.errors import RequestError
from lamella.messages import (
    MAX_PROMPT_CHARS,
    ChatMessage,
    GenerateRequest,
    Priority,
    SamplingParams,
    check_model_name,
)
from lamella.mistakes import explained, shown
from lamella.queue_terms import DEFAULT_TERMS, QueueTerms, checked_terms
from lamella.response_format import FormatArgument

SAMPLING_KEYS = tuple(SamplingParams.model_fields)
MAX_KEY_CHARS = 200

NO_TERMS = AnswerTerms()
_NEWER_FIELDS = ("logit_bias", "tool_calls", "tool_call_id")
_ANSWER: TypeAdapter[object] = TypeAdapter(object)

Messages = Sequence[ChatMessage | Mapping[str, object]]


class SamplingOptions(TypedDict, total=False):
    """The keys of SamplingParams, for callers who give them one by one."""

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | Sequence[tuple[int, float]] | None


class SubmitOptions(SamplingOptions, total=False):
    """Everything a submit takes besides the prompt.

    `messages` is a chat in place of a prompt; `sampling` a whole SamplingParams, over which single sampling keys take
    precedence; `idempotency_key` makes a repeated submit return the first one's job; `require_worker` (default True)
    refuses a model that no live worker serves, instead of queueing the job until one does.

    Jobs of `user` (default: one anonymous user) share the workers fairly with those of other users; `priority` is
    "high", "normal" (default) or "low"; after `deadline_s` seconds the job is ended, with what it has by then.

    `response_format` says what the answer must look like: ``{"type": "json_object"}``, ``{"type": "json_schema",
    "schema": {...}}`` (or OpenAI's nested form, or a pydantic model's class), ``{"type": "regex", "regex": "..."}``,
    ``{"type": "choice", "choice": [...]}`` or ``{"type": "grammar", "grammar": "..."}``. `tools` are functions that the
    model may call, in OpenAI's form; `tool_choice` is "auto" (default), "none", "required" or one tool.
    """

    messages: Messages | None
    model: str | None
    sampling: SamplingParams | None
    idempotency_key: str | None
    require_worker: bool
    user: str | None
    priority: Priority | str
    deadline_s: float | None
    response_format: FormatArgument | None
    tools: Sequence[FunctionTool | Mapping[str, object]] | None
    tool_choice: NamedTool | Mapping[str, object] | str | None


@dataclass(frozen=True)
class RequestDraft:
    """A checked request whose model may still be open (None: the only one that is served)."""

    prompt: str | None
    messages: tuple[ChatMessage, ...] | None
    model: str | None
    sampling: SamplingParams
    idempotency_key: str | None
    require_worker: bool
    terms: QueueTerms = DEFAULT_TERMS
    answer: AnswerTerms = NO_TERMS

    def request_hash(self) -> str:
        """Return a hash of the request as it was asked for, before model and seed are filled in."""
        asked: dict[str, object] = {
            "prompt": self.prompt,
            "messages": None if self.messages is None else [_as_asked(message) for message in self.messages],
            "model": self.model,
            "sampling": _as_asked(self.sampling),
        }
        if self.answer != NO_TERMS:
            asked["answer"] = [_ANSWER.dump_python(term, mode="json") for term in self.answer]
        if self.terms != DEFAULT_TERMS:
            asked["terms"] = list(self.terms)
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def request(self, model: str) -> GenerateRequest:
        """Return the request for `model`, with a seed drawn if sampling needs one."""
        sampling = self.sampling
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = sampling.model_copy(update={"seed": secrets.randbits(63)})
        return _validated_request(self.prompt, self.messages, model, sampling, self.answer)


def draft_request(prompt: str | None, options: Mapping[str, object]) -> RequestDraft:
    """Check the arguments of a submit.

    Raises:
        RequestError: an argument is unknown, of the wrong type or out of range.
    """
    given = dict(options)
    messages = checked_messages(given.pop("messages", None))
    model = given.pop("model", None)
    base = given.pop("sampling", None)
    key = checked_idempotency_key(given.pop("idempotency_key", None))
    require_worker = given.pop("require_worker", True)
    if not isinstance(require_worker, bool):
        raise RequestError(f"require_worker is {shown(require_worker)}; use True or False")
    terms = checked_terms(given.pop("user", None), given.pop("priority", None), given.pop("deadline_s", None))
    answer = checked_answer_terms(
        given.pop("response_format", None), given.pop("tools", None), given.pop("tool_choice", None)
    )
    if model is not None:
        model = checked_model(model)
    _check_prompt(prompt, messages)
    sampling = _sampling(base, given)
    _validated_request(prompt, messages, model or "any", sampling, answer)
    return RequestDraft(prompt, messages, model, sampling, key, require_worker, terms, answer)


def _as_asked(part: ChatMessage | SamplingParams) -> dict[str, object]:
    """Its fields, those of newer versions only where they say something: a request keeps its hash through upgrades."""
    return {name: value for name, value in part.model_dump().items() if value is not None or name not in _NEWER_FIELDS}


def _check_prompt(prompt: object, messages: tuple[ChatMessage, ...] | None) -> None:
    if prompt is None and messages is None:
        raise RequestError("there is no prompt; give prompt='text', or messages=[...] for a chat")
    if prompt is not None and not isinstance(prompt, str):
        fix = "convert it to str"
        if isinstance(prompt, bytes):
            fix = "decode it first, e.g. prompt.decode('utf-8')"
        elif isinstance(prompt, list | tuple):
            fix = "for a chat pass messages=[...]; for several prompts submit each by itself"
        raise RequestError(f"the prompt must be text (str), not {type(prompt).__name__}; {fix}")
    try:
        (prompt or "").encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt is not valid text (a lone surrogate at character {error.start}); decode its bytes as UTF-8"
        ) from error


def checked_model(model: object) -> str:
    """Return `model` if it is a model's name; raises RequestError."""
    if not isinstance(model, str):
        raise RequestError(f"model is {shown(model)}; use its name as text, such as 'owner/name'")
    try:
        return check_model_name(model)
    except ValueError as error:
        raise RequestError(f"model {error}") from error


def checked_idempotency_key(key: object) -> str | None:
    """Return `key` if it can be one; raises RequestError."""
    if key is None:
        return None
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEY_CHARS or not key.isprintable():
        raise RequestError(f"idempotency_key is {shown(key)}; use 1 to {MAX_KEY_CHARS} printable characters")
    return key


def _sampling(base: object, options: Mapping[str, object]) -> SamplingParams:
    if base is None:
        base = SamplingParams()
    if not isinstance(base, SamplingParams):
        raise RequestError(
            f"sampling is of type {type(base).__name__}; use SamplingParams(...), or give the keys one by one: "
            "submit(prompt, temperature=0.7)"
        )
    fields = {**base.model_dump(), **options}
    if isinstance(fields["stop"], str):
        fields["stop"] = (fields["stop"],)
    for key in ("stop", "stop_token_ids"):
        if isinstance(fields[key], list):
            fields[key] = tuple(fields[key])
    fields["logit_bias"] = _logit_bias(fields["logit_bias"])
    try:
        return SamplingParams.model_validate(fields, strict=True)
    except ValidationError as error:
        raise RequestError(explained(error, "", SAMPLING_KEYS)) from error


def _logit_bias(given: object) -> object:
    """Pairs in order of the token ids, from a mapping whose ids may be text, as JSON has them."""
    if isinstance(given, Mapping):
        given = list(given.items())
    if not isinstance(given, list | tuple):
        return given
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else pair for pair in given]
    for place, pair in enumerate(pairs):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise RequestError(f"logit_bias[{place}] is {shown(pair)}; use a mapping such as {{50256: -100}}")
        token_id, bias = pair
        if isinstance(token_id, str) and token_id.isascii() and token_id.isdecimal() and len(token_id) <= 10:
            pairs[place] = (int(token_id), bias)
        elif isinstance(token_id, bool) or not isinstance(token_id, int):
            raise RequestError(f"logit_bias: {shown(token_id)} is no token id; use whole numbers")
    return tuple(sorted(pairs, key=itemgetter(0))) or None


def _validated_request(
    prompt: str | None,
    messages: tuple[ChatMessage, ...] | None,
    model: str,
    sampling: SamplingParams,
    answer: AnswerTerms,
) -> GenerateRequest:
    if len(prompt or "") > MAX_PROMPT_CHARS:
        raise RequestError(f"the prompt has {len(prompt or '')} characters; at most {MAX_PROMPT_CHARS} can be sent")
    try:
        return GenerateRequest(model=model, prompt=prompt, messages=messages, sampling=sampling, **answer._asdict())
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RequestError(message) from error
