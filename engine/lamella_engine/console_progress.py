"""How far a long build is, on standard error: a bar on a terminal, a line every few seconds elsewhere.

Also shows what the engine logs meanwhile, such as whose build is being waited for. `cli` opens it around each build.
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from lamella_engine.byte_size import byte_size

LINE_EVERY_S = 5.0
_PACKAGE = "lamella_engine"


class ConsoleProgress:
    """A `progress.Progress` for people; use it as a context manager, from one thread.

    Args:
        unit: what is counted instead of bytes, such as ``tokens``.
    """

    def __init__(self, unit: str | None = None) -> None:
        self._unit = unit
        self._bar = _bar(unit) if sys.stderr.isatty() else None
        self._phases: dict[str, TaskID] = {}
        self._last: dict[str, tuple[float, bool]] = {}
        self._logs = _ShownLogs(self)

    def __enter__(self) -> ConsoleProgress:
        if self._bar is not None:
            self._bar.start()
        self._logs.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._logs.stop()
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """See `progress.Progress`."""
        if self._bar is None:
            self._line(phase, done_bytes, total_bytes)
            return
        if phase not in self._phases:
            self._phases[phase] = self._bar.add_task(phase, total=total_bytes)
        self._bar.update(self._phases[phase], completed=done_bytes, total=total_bytes)

    def say(self, text: str) -> None:
        """Write a line without spoiling the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201  this is the command line's output

    def _line(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """The first and the last figure of a phase always show, those between only every `LINE_EVERY_S`."""
        now = time.monotonic()
        is_done = done_bytes >= total_bytes
        last = self._last.get(phase)
        if last is not None and (last[1] or not is_done) and now - last[0] < LINE_EVERY_S:
            return
        if last is not None and last[1] and is_done:
            return
        self._last[phase] = (now, is_done)
        percent = f" ({100 * done_bytes // total_bytes} %)" if total_bytes else ""
        self.say(f"{phase}: {self._done_of(done_bytes, total_bytes)}{percent}")

    def _done_of(self, done: int, total: int) -> str:
        return f"{byte_size(done)} of {byte_size(total)}" if self._unit is None else f"{done} of {total} {self._unit}"


class _ShownLogs(logging.Handler):
    """Passes the engine's log lines to the console while a build runs."""

    def __init__(self, console: ConsoleProgress) -> None:
        super().__init__(logging.INFO)
        self._console = console
        self._level_before = logging.NOTSET

    def start(self) -> None:
        logger = logging.getLogger(_PACKAGE)
        self._level_before = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def stop(self) -> None:
        logger = logging.getLogger(_PACKAGE)
        logger.removeHandler(self)
        logger.setLevel(self._level_before)

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(record.getMessage())


def _bar(unit: str | None) -> Progress:
    amount = DownloadColumn(binary_units=True) if unit is None else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
