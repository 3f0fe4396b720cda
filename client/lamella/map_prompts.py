"""From the prompts of a `Client.map` to the jobs of a run: what each asks, and under which key.

Neighbours: `client` and `async_client` (which take the arguments), `map_run` (which sends the jobs).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass

from lamella.connection import check_seconds
from lamella.errors import RequestError
from lamella.map_meter import ProgressCall
from lamella.map_run import MapBounds, check_in_flight
from lamella.messages import ChatMessage
from lamella.request_draft import RequestDraft, SubmitOptions, draft_request
from lamella.stream_clock import DEFAULT_WAIT_S

MapPrompt = str | Sequence[ChatMessage | Mapping[str, str]] | Mapping[str, object]
"""Raw text, a chat, or the arguments of a submit (with ``prompt`` or ``messages``) that go before those of all."""

MAX_KEY_CHARS = 160  # leaves room for the place and the attempt


class MapOptions(SubmitOptions, total=False):
    """Everything a map takes besides prompts and `errors`: what a submit takes, for all jobs, and how to go about it.

    `in_flight` bounds the jobs under way (default: twice the slots of the live workers); `progress` is called with a
    MapProgress after every look, or True for a bar on stderr; after `timeout_s` seconds in which no job brings anything
    WaitTimeout is raised.
    """

    in_flight: int | None
    progress: ProgressCall | bool
    timeout_s: float


@dataclass(frozen=True)
class PromptTask:
    """One prompt of a map; `key` names all of its jobs, `options` are the arguments of each."""

    place: int
    prompt: object
    options: Mapping[str, object]
    key: str

    def draft(self, attempt: int) -> RequestDraft:
        """Return the request; raises RequestError that names the prompt by its place."""
        text, options = self._arguments()
        options["idempotency_key"] = f"{self.key}-{self.place}" + (f"-{attempt}" if attempt else "")
        try:
            return draft_request(text, options)
        except RequestError as error:
            raise type(error)(f"prompt {self.place} (counted from 0): {error}") from error

    def _arguments(self) -> tuple[str | None, dict[str, object]]:
        match self.prompt:
            case Mapping():
                if "idempotency_key" in self.prompt:
                    raise RequestError(f"prompt {self.place}: give idempotency_key once, for the whole map")
                options: dict[str, object] = {**self.options, **self.prompt}
                return options.pop("prompt", None), options  # type: ignore[return-value]  # draft_request checks it
            case str() | bytes():
                return self.prompt, dict(self.options)  # type: ignore[return-value]  # as above
            case _:
                return None, {**self.options, "messages": self.prompt}


@dataclass(frozen=True)
class PromptMap:
    """A checked map: its tasks, its bounds, and what is done with errors and progress."""

    tasks: Iterator[PromptTask]
    bounds: MapBounds
    total: int | None
    raises: bool
    progress: ProgressCall | bool


def prompt_map(prompts: Iterable[MapPrompt], errors: str, options: Mapping[str, object], away_s: float) -> PromptMap:
    """Check the arguments of a map; nothing is asked of the server.

    Raises:
        RequestError: a setting is unusable. What is wrong with a prompt is found when its turn comes.
    """
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise RequestError(
            f"prompts is of type {type(prompts).__name__}; give several of them, such as ['one', 'two'], or use "
            "generate() for one"
        )
    if "messages" in options:
        raise RequestError("messages belong to each prompt: map([[{'role': 'user', 'content': 'Hello'}], ...])")
    if errors not in ("raise", "return"):
        raise RequestError(f"errors is {errors!r}; use 'raise' or 'return'")
    common = dict(options)
    in_flight, timeout_s = common.pop("in_flight", None), common.pop("timeout_s", DEFAULT_WAIT_S)
    progress, key = common.pop("progress", False), common.pop("idempotency_key", None)
    if not callable(progress) and not isinstance(progress, bool):
        raise RequestError(f"progress is of type {type(progress).__name__}; give a function, or True for a bar")
    bounds = MapBounds(
        in_flight=check_in_flight(in_flight),
        silence_s=check_seconds("timeout_s", timeout_s),
        away_s=away_s,
        resumes=key is not None,
    )
    name = _key(key)
    tasks = (PromptTask(place, prompt, common, name) for place, prompt in enumerate(prompts))
    total = len(prompts) if isinstance(prompts, Sized) else None
    return PromptMap(tasks, bounds, total, errors == "raise", progress)


def _key(key: object) -> str:
    if key is None:
        return f"map-{uuid.uuid4().hex}"
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEY_CHARS or not key.isprintable():
        raise RequestError(
            f"idempotency_key is {str(key)[:60]!r}; for a map use 1 to {MAX_KEY_CHARS} printable letters"
        )
    return key
