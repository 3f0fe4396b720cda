"""From a caller's arguments to a request: every mistake is named with the key, the value and the fix, nothing is sent.

Owns validation at the edge and the hash that an idempotency key stands for. Neighbours: `client` (which takes the
arguments), `submission` (which picks the model and sends the request).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pydantic import ValidationError

from lamella.errors import RequestError
from lamella.messages import (
    MAX_PROMPT_CHARS,
    ChatMessage,
    GenerateRequest,
    Priority,
    SamplingParams,
    check_model_name,
)
from lamella.queue_terms import DEFAULT_TERMS, QueueTerms, checked_terms

SAMPLING_KEYS = tuple(SamplingParams.model_fields)
MAX_KEY_CHARS = 200

Messages = Sequence[ChatMessage | Mapping[str, str]]


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


class SubmitOptions(SamplingOptions, total=False):
    """Everything a submit takes besides the prompt.

    `messages` is a chat in place of a prompt; `sampling` a whole SamplingParams, over which single sampling keys take
    precedence; `idempotency_key` makes a repeated submit return the first one's job; `require_worker` (default True)
    refuses a model that no live worker serves, instead of queueing the job until one does.

    Jobs of `user` (default: one anonymous user) share the workers fairly with those of other users; `priority` is
    "high", "normal" (default) or "low"; after `deadline_s` seconds the job is ended, with what it has by then.
    """

    messages: Messages | None
    model: str | None
    sampling: SamplingParams | None
    idempotency_key: str | None
    require_worker: bool
    user: str | None
    priority: Priority | str
    deadline_s: float | None


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

    def request_hash(self) -> str:
        """Return a hash of the request as it was asked for, before model and seed are filled in."""
        asked: dict[str, object] = {
            "prompt": self.prompt,
            "messages": [message.model_dump() for message in self.messages] if self.messages is not None else None,
            "model": self.model,
            "sampling": self.sampling.model_dump(),
        }
        if self.terms != DEFAULT_TERMS:
            asked["terms"] = list(self.terms)
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def request(self, model: str) -> GenerateRequest:
        """Return the request for `model`, with a seed drawn if sampling needs one."""
        sampling = self.sampling
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = sampling.model_copy(update={"seed": secrets.randbits(63)})
        return _validated_request(self.prompt, self.messages, model, sampling)


def draft_request(prompt: str | None, options: Mapping[str, object]) -> RequestDraft:
    """Check the arguments of a submit.

    Raises:
        RequestError: an argument is unknown, of the wrong type or out of range.
    """
    given = dict(options)
    messages = _messages(given.pop("messages", None))
    model = given.pop("model", None)
    base = given.pop("sampling", None)
    key = _idempotency_key(given.pop("idempotency_key", None))
    require_worker = given.pop("require_worker", True)
    if not isinstance(require_worker, bool):
        raise RequestError(f"require_worker is {_shown(require_worker)}; use True or False")
    terms = checked_terms(given.pop("user", None), given.pop("priority", None), given.pop("deadline_s", None))
    if model is not None:
        model = _model(model)
    _check_prompt(prompt, messages)
    sampling = _sampling(base, given)
    _validated_request(prompt, messages, model or "any", sampling)
    return RequestDraft(prompt, messages, model, sampling, key, require_worker, terms)


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


def _model(model: object) -> str:
    if not isinstance(model, str):
        raise RequestError(f"model is {_shown(model)}; use its name as text, such as 'owner/name'")
    try:
        return check_model_name(model)
    except ValueError as error:
        raise RequestError(f"model {error}") from error


def _idempotency_key(key: object) -> str | None:
    if key is None:
        return None
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEY_CHARS or not key.isprintable():
        raise RequestError(f"idempotency_key is {_shown(key)}; use 1 to {MAX_KEY_CHARS} printable characters")
    return key


def _messages(messages: object) -> tuple[ChatMessage, ...] | None:
    if messages is None:
        return None
    form = "give a list such as [{'role': 'user', 'content': 'Hello'}]"
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is of type {type(messages).__name__}; {form}")
    checked = []
    for position, message in enumerate(messages):
        if isinstance(message, ChatMessage):
            checked.append(message)
            continue
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{position}] is of type {type(message).__name__}; {form}")
        try:
            checked.append(ChatMessage.model_validate(dict(message), strict=True))
        except ValidationError as error:
            raise RequestError(_explained(error, f"messages[{position}].", tuple(ChatMessage.model_fields))) from error
    return tuple(checked)


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
    try:
        return SamplingParams.model_validate(fields, strict=True)
    except ValidationError as error:
        raise RequestError(_explained(error, "", SAMPLING_KEYS)) from error


def _validated_request(
    prompt: str | None, messages: tuple[ChatMessage, ...] | None, model: str, sampling: SamplingParams
) -> GenerateRequest:
    if len(prompt or "") > MAX_PROMPT_CHARS:
        raise RequestError(f"the prompt has {len(prompt or '')} characters; at most {MAX_PROMPT_CHARS} can be sent")
    try:
        return GenerateRequest(model=model, prompt=prompt, messages=messages, sampling=sampling)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RequestError(message) from error


def _explained(error: ValidationError, where: str, known: tuple[str, ...]) -> str:
    """Say the first mistake: key, value, what is wrong, and the known keys if the key is not one."""
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    place = where + key + "".join(f"[{part}]" for part in first["loc"][1:])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=len(known), cutoff=0.5)
        ordered = ", ".join([*near, *(name for name in known if name not in near)])
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {place!r}; {hint}known keys: {ordered}"
    if first["type"] == "missing":
        return f"{place} is missing; the keys are {', '.join(known)}"
    wrong = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return f"{place} is {_shown(first['input'])}: {wrong[0].lower()}{wrong[1:]}"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than 4300 digits
        text = "a number with thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
