"""The lines of a batch as jobs, a window at a time, and what is written for each line once its jobs have ended.

Owns the windows, the idempotency keys and the check that no custom_id comes twice; does no I/O but reading the input.
Neighbours: `batch_lines` and `batch_form` below, `map_run` (which takes the tasks), `batch_run`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import BinaryIO, NamedTuple

from lamella.batch_form import LineForm, LineJobs
from lamella.batch_lines import SUBMIT_URLS, BatchError, BatchUrl, RawLine, parse_line, raw_lines
from lamella.batch_order import ordered
from lamella.errors import LamellaError
from lamella.map_flight import Brought
from lamella.map_run import Draft, MapResult
from lamella.queue_terms import expected_cost

WINDOW_LINES = 256
WINDOW_BYTES = 64_000_000


class Record(NamedTuple):
    """A line to be written, and to which of the two files."""

    text: str
    is_error: bool


@dataclass(frozen=True)
class BatchTask:
    """One job of the line `number`; `error` says why it cannot be one."""

    place: int
    number: int
    key: str
    asked: Draft | None = None
    error: BatchError | None = None

    def draft(self, attempt: int) -> Draft:
        """Return the request; raises BatchError."""
        if self.error is not None or self.asked is None:
            raise self.error or BatchError("invalid_line", "the line was not read")
        return replace(self.asked, idempotency_key=f"{self.key}-{self.asked.request_hash()[:16]}-{attempt}")

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer, as the queue estimates them; 1 for a line that cannot be a job."""
        if self.asked is None:
            return 1
        cost = expected_cost(self.asked.request("any"))
        return cost.prompt + cost.answer


@dataclass
class _LineUnderWay:
    """A line whose jobs have not all ended."""

    number: int
    custom_id: str | None
    jobs: LineJobs | None
    results: list[Brought] = field(default_factory=list)
    error: LamellaError | None = None
    num_ended: int = 0

    @property
    def is_ended(self) -> bool:
        return self.num_ended == (1 if self.jobs is None else len(self.jobs.drafts))

    def take(self, outcome: Brought | LamellaError) -> None:
        self.num_ended += 1
        if not isinstance(outcome, LamellaError):
            self.results.append(outcome)
        elif self.error is None:
            self.error = outcome


class BatchTasks:
    """An iterator over the tasks of an input, from the line after `last` on; changed only by who iterates.

    Args:
        source: the input, at its beginning.
        batch_id: its identity.
        form: what lines mean.
        last: number of the last line that is done.
        place_name: tells the jobs of one output from those of another.
        urls: what lines may ask for.
    """

    def __init__(
        self,
        source: BinaryIO,
        batch_id: str,
        form: LineForm,
        *,
        last: int = 0,
        place_name: str = "",
        urls: tuple[BatchUrl, ...] = SUBMIT_URLS,
    ) -> None:
        self._lines = raw_lines(source)
        self._batch_id = batch_id
        self._form = form
        self._last = last
        self._key = f"batch-{batch_id}-{hashlib.sha256(place_name.encode()).hexdigest()[:8]}"
        self._urls = urls
        self._seen: dict[bytes, int] = {}  # hashes of custom ids, and where they were first
        self._under_way: dict[int, _LineUnderWay] = {}  # by the places of their jobs
        self._places = 0

    def __iter__(self) -> Iterator[BatchTask]:
        """Yield the tasks, window by window."""
        while window := self._window():
            yield from ordered(window)

    def record(self, result: MapResult) -> Record | None:
        """Return what is written for a line with the last of its results, None before; each can be given once."""
        line = self._under_way.pop(result.place)
        line.take(result.outcome)
        if not line.is_ended:
            return None
        if line.error is not None or line.jobs is None:
            error = line.error or BatchError("invalid_line", f"line {line.number} was not read")
            return Record(self._form.failure(self._batch_id, line.number, line.custom_id, error), is_error=True)
        return Record(line.jobs.record(self._batch_id, line.results), is_error=False)

    def check(self, raw: RawLine) -> LineJobs:
        """Return the jobs of a line that is not to be run now; raises BatchError where it cannot be one."""
        line = parse_line(raw, self._urls)
        self._check_new(line.custom_id, raw.number)
        return self._form.read(line)

    def _window(self) -> list[BatchTask]:
        window: list[BatchTask] = []
        num_bytes = num_lines = 0
        for raw in self._lines:
            if raw.number <= self._last:
                self._remember(raw)
                continue
            window += self._tasks(raw)
            num_lines += 1
            num_bytes += len(raw.raw or b"")
            if num_lines >= WINDOW_LINES or num_bytes >= WINDOW_BYTES:
                break
        return window

    def _tasks(self, raw: RawLine) -> list[BatchTask]:
        key, custom_id = f"{self._key}-{raw.number}", None
        try:
            line = parse_line(raw, self._urls)
            custom_id = line.custom_id
            self._check_new(custom_id, raw.number)
            jobs = self._form.read(line)
        except BatchError as error:
            self._under_way[self._places] = _LineUnderWay(raw.number, custom_id or error.custom_id, None)
            self._places += 1
            return [BatchTask(self._places - 1, raw.number, key, error=error)]
        under_way = _LineUnderWay(raw.number, custom_id, jobs)
        tasks = []
        for index, draft in enumerate(jobs.drafts):
            tasks.append(BatchTask(self._places, raw.number, f"{key}.{index}" if index else key, draft))
            self._under_way[self._places] = under_way
            self._places += 1
        return tasks

    def _remember(self, raw: RawLine) -> None:
        try:
            line = parse_line(raw, self._urls)
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
