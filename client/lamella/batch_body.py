"""From the body of a line to the arguments of a submit: every key is understood, or refused by name.

Owns the table of OpenAI's keys: which become arguments, which are taken in one value only because nothing else can be
done here. What the arguments may be is `request_draft`'s to say. Does no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lamella.batch_lines import BatchError, BatchUrl
from lamella.errors import RequestError
from lamella.request_draft import SAMPLING_KEYS, SubmitOptions, draft_request

# Keys that a submit takes under the same name, in all forms.
_ALIKE = tuple(name for name in SAMPLING_KEYS if name not in ("max_tokens", "logprobs"))
_TERMS = ("user", "priority", "deadline_s")
# Keys that jobs may learn to take: given on if they do, else only as nothing.
_OF_JOBS = ("response_format", "tools", "tool_choice", "parallel_tool_calls", "logit_bias")
# Keys that mean something elsewhere, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "logit_bias": ({},),
}
_REASONS = {
    "n": "give a line for each sample, with seeds of their own",
    "stream": "a batch has no stream",
    "suffix": "text is only continued",
}
_CHAT_KEYS = ("messages", "max_completion_tokens", "top_logprobs", "modalities", "tools", "tool_choice")
_COMPLETION_KEYS = ("prompt", "best_of", "echo", "suffix")


@dataclass(frozen=True)
class BodyDefaults:
    """What holds for lines that do not say so themselves; only `model` goes before what lines name."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    fallback_model: str | None = None


NO_DEFAULTS = BodyDefaults()


def submit_arguments(
    url: BatchUrl, body: Mapping[str, object], defaults: BodyDefaults = NO_DEFAULTS
) -> tuple[str | None, dict[str, object]]:
    """Return prompt and options of a submit for a line's body, checked.

    Raises:
        BatchError: a key is unknown, has a value that cannot be, or asks for what is not done here; it is named.
    """
    given = {key: value for key, value in body.items() if value is not None}
    _check_known(url, given)
    options: dict[str, object] = {key: given[key] for key in (*_ALIKE, *_TERMS) if key in given}
    _take_model_and_length(url, given, defaults, options)
    _take_logprobs(url, given, options)
    for key in _OF_JOBS:
        if key in given and key in SubmitOptions.__annotations__:
            options[key] = given[key]
    prompt = _take_prompt(given, options)
    try:
        draft_request(prompt, options)
    except RequestError as error:
        raise BatchError("invalid_request", str(error), _param(str(error), given)) from error
    return prompt, options


def _check_known(url: BatchUrl, given: Mapping[str, object]) -> None:
    allowed = {
        *_ALIKE,
        *_TERMS,
        *_OF_JOBS,
        *_NEUTRAL,
        "model",
        "max_tokens",
        "logprobs",
        *_CHAT_KEYS,
        *_COMPLETION_KEYS,
    }
    if url is BatchUrl.CHAT:
        allowed -= set(_COMPLETION_KEYS)
    elif url is BatchUrl.COMPLETIONS:
        allowed -= set(_CHAT_KEYS)
    for key, value in given.items():
        if key not in allowed:
            raise BatchError("unknown_parameter", f"{key[:60]!r} is not known for {url.value}", key[:60])
        takes = key in _OF_JOBS and key in SubmitOptions.__annotations__
        if key in _NEUTRAL and not takes and not _is_one_of(value, _NEUTRAL[key]):
            why = _REASONS.get(key, "jobs of this service do not do that")
            raise BatchError("unsupported_parameter", f"{key} is {_shown(value)}: {why}; leave it out", key)


def _is_one_of(value: object, values: tuple[object, ...]) -> bool:
    return any(type(value) is type(each) and value == each for each in values)


def _take_model_and_length(
    url: BatchUrl, given: Mapping[str, object], defaults: BodyDefaults, options: dict[str, object]
) -> None:
    model = defaults.model or given.get("model") or defaults.fallback_model
    if model is None:
        raise BatchError("invalid_request", "model is missing, and not exactly one model is served; name it", "model")
    options["model"] = model
    lengths = [key for key in ("max_tokens", "max_completion_tokens") if key in given]
    if len(lengths) == 2 and given[lengths[0]] != given[lengths[1]]:
        raise BatchError("invalid_request", "max_tokens and max_completion_tokens differ; give one", "max_tokens")
    if lengths:
        options["max_tokens"] = given[lengths[-1]]
    elif defaults.max_tokens is not None:
        options["max_tokens"] = defaults.max_tokens
    if defaults.temperature is not None:
        options.setdefault("temperature", defaults.temperature)
    for key in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        value = options.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**6:
            options[key] = float(value)  # JSON writes 1.0 as 1


def _take_logprobs(url: BatchUrl, given: Mapping[str, object], options: dict[str, object]) -> None:
    logprobs, top = given.get("logprobs"), given.get("top_logprobs")
    if url is not BatchUrl.CHAT:
        if top is not None:
            raise BatchError("unknown_parameter", "top_logprobs is a chat's; give logprobs as a number", "top_logprobs")
        if logprobs is not None:
            options["logprobs"] = logprobs
        return
    if logprobs is not None and not isinstance(logprobs, bool):
        raise BatchError("invalid_request", f"logprobs is {_shown(logprobs)}; use true or false", "logprobs")
    if top is not None and not logprobs:
        raise BatchError("invalid_request", "top_logprobs is given without logprobs: true", "top_logprobs")
    if logprobs:
        options["logprobs"] = 0 if top is None else top


def _take_prompt(given: Mapping[str, object], options: dict[str, object]) -> str | None:
    if "messages" in given:
        options["messages"] = _messages(given["messages"])
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if prompt is not None and not isinstance(prompt, str):
        raise BatchError(
            "invalid_request", f"prompt is {_shown(prompt)}; use text, and a line for each of several", "prompt"
        )
    if prompt is not None and "messages" in given:
        raise BatchError("invalid_request", "the line has prompt and messages; give one of them", "prompt")
    return prompt


def _messages(messages: object) -> object:
    if not isinstance(messages, list):
        return messages
    return [_message(place, message) for place, message in enumerate(messages)]


def _message(place: int, message: object) -> object:
    if not isinstance(message, dict):
        return message
    taken = {key: value for key, value in message.items() if value is not None or key in ("role", "content")}
    if taken.get("role") == "developer":
        taken["role"] = "system"
    if isinstance(content := taken.get("content"), list):
        taken["content"] = "".join(_part(f"messages[{place}].content[{at}]", part) for at, part in enumerate(content))
    return taken


def _part(where: str, part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(text := part.get("text"), str):
        return text
    kind = part.get("type") if isinstance(part, dict) else part
    raise BatchError("unsupported_parameter", f"{where} is {_shown(kind)}; only parts of text can be read", where)


def _param(message: str, given: Mapping[str, object]) -> str | None:
    """Return the key of the body that an error names."""
    words = message.replace("'", " ").replace("[", " ").split()
    return next((word for word in words[:3] if word in given), None)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
