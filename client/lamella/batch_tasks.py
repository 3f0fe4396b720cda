"""The lines of a batch as jobs, a window at a time, and what is written for each result.

Owns the windows, the idempotency keys and the check that no custom_id comes twice; does no I/O but reading the input.
Neighbours: `batch_lines` and `batch_body` below, `map_run` (which takes the tasks), `batch_run`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from lamella.batch_body import BodyDefaults, submit_arguments
from lamella.batch_lines import BatchError, BatchLine, RawLine, parse_line, raw_lines
from lamella.batch_order import ordered
from lamella.batch_results import answer_record, error_record
from lamella.errors import LamellaError
from lamella.map_run import MapResult
from lamella.queue_terms import expected_cost
from lamella.request_draft import RequestDraft, draft_request

WINDOW_LINES = 256
WINDOW_BYTES = 64_000_000


class Record(NamedTuple):
    """A line to be written, and to which of the two files."""

    text: str
    is_error: bool


@dataclass(frozen=True)
class BatchTask:
    """One line; `error` says why it cannot be a job, else `prompt` and `options` are the arguments of its submit."""

    place: int
    number: int
    key: str
    custom_id: str | None = None
    line: BatchLine | None = None
    prompt: str | None = None
    options: dict[str, object] | None = None
    error: BatchError | None = None

    def draft(self, attempt: int) -> RequestDraft:
        """Return the request; raises BatchError."""
        if self.error is not None or self.options is None:
            raise self.error or BatchError("invalid_line", "the line was not read")
        asked = draft_request(self.prompt, self.options).request_hash()[:16]
        return draft_request(self.prompt, {**self.options, "idempotency_key": f"{self.key}-{asked}-{attempt}"})

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer, as the queue estimates them; 1 for a line that cannot be a job."""
        if self.options is None:
            return 1
        cost = expected_cost(draft_request(self.prompt, self.options).request("any"))
        return cost.prompt + cost.answer


class BatchTasks:
    """An iterator over the tasks of an input, from the line after `last` on; changed only by who iterates.

    Args:
        source: the input, at its beginning.
        batch_id: its identity.
        defaults: what lines that do not say leave to it.
        last: number of the last line that is done.
        place_name: tells the jobs of one output from those of another.
        queues: jobs wait for a worker where none serves their model yet.
    """

    def __init__(
        self,
        source: BinaryIO,
        batch_id: str,
        defaults: BodyDefaults,
        *,
        last: int = 0,
        place_name: str = "",
        queues: bool = False,
    ) -> None:
        self._lines = raw_lines(source)
        self._batch_id = batch_id
        self._defaults = defaults
        self._last = last
        self._key = f"batch-{batch_id}-{hashlib.sha256(place_name.encode()).hexdigest()[:8]}"
        self._queues = queues
        self._seen: dict[bytes, int] = {}  # hashes of custom ids, and where they were first
        self._under_way: dict[int, BatchTask] = {}
        self._places = 0

    def __iter__(self) -> Iterator[BatchTask]:
        """Yield the tasks, window by window."""
        while window := self._window():
            yield from ordered(window)

    def record(self, result: MapResult) -> Record:
        """Return what is written for a result; each can be asked for once."""
        task = self._under_way.pop(result.place)
        if isinstance(result.outcome, LamellaError):
            return Record(error_record(self._batch_id, task.number, task.custom_id, result.outcome), is_error=True)
        if task.line is None or task.options is None:
            raise BatchError("invalid_line", f"line {task.number} has an answer, but was not read")
        model = str(task.options["model"])
        return Record(answer_record(self._batch_id, task.line, model, result.outcome), is_error=False)

    def _window(self) -> list[BatchTask]:
        window: list[BatchTask] = []
        num_bytes = 0
        for raw in self._lines:
            if raw.number <= self._last:
                self._remember(raw)
                continue
            task = self._task(raw)
            self._under_way[task.place] = task
            self._places += 1
            window.append(task)
            num_bytes += len(raw.raw or b"")
            if len(window) >= WINDOW_LINES or num_bytes >= WINDOW_BYTES:
                break
        return window

    def _task(self, raw: RawLine) -> BatchTask:
        place, number, key = self._places, raw.number, f"{self._key}-{raw.number}"
        custom_id = None
        try:
            line = parse_line(raw)
            custom_id = line.custom_id
            self._check_new(custom_id, number)
            prompt, options = submit_arguments(line.url, line.body, self._defaults)
        except BatchError as error:
            return BatchTask(place, number, key, custom_id or error.custom_id, error=error)
        if self._queues:
            options["require_worker"] = False
        return BatchTask(place, number, key, custom_id, line, prompt, options)

    def _remember(self, raw: RawLine) -> None:
        try:
            line = parse_line(raw)
            self._check_new(line.custom_id, line.number)
        except BatchError:
            return  # it has its record already

    def _check_new(self, custom_id: str | None, number: int) -> None:
        if custom_id is None:
            return
        digest = hashlib.blake2b(custom_id.encode(), digest_size=12).digest()
        before = self._seen.setdefault(digest, number)
        if before != number:
            raise BatchError(
                "duplicate_custom_id", f"custom_id {custom_id[:60]!r} is that of line {before}", "custom_id", custom_id
            )
