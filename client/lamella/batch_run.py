"""Runs a batch: every line of a file as a job, answers and errors written in the order of the lines.

Owns how the parts come together over a synchronous client. What survives a crash is in the files and on the server:
running the same again goes on where it was. Neighbours: `batch_tasks`, `batch_files`, `map_sync`; the command
``lamella batch run``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import BinaryIO, NamedTuple

from lamella.batch_body import BodyDefaults
from lamella.batch_files import BatchFiles, BatchInput, Resumed
from lamella.batch_tasks import WINDOW_LINES, BatchTasks
from lamella.connection import Connection
from lamella.errors import LamellaError
from lamella.map_meter import MapMeter, ProgressCall
from lamella.map_run import MapBounds, MapRun
from lamella.map_sync import drive

AWAY_S = 600.0
GRACE_S = 20.0  # above the time after which a lost worker is off the list, and another may be on it
SILENCE_S = 6 * 3600.0


class BatchStopped(LamellaError):
    """The run was asked to stop; what is done is written, the rest was cancelled."""


class BatchSettings(NamedTuple):
    """How a batch is run; see `MapBounds` for the spans of time."""

    defaults: BodyDefaults = BodyDefaults()
    in_flight: int | None = None
    queues: bool = False
    silence_s: float = SILENCE_S
    away_s: float = AWAY_S
    grace_s: float = GRACE_S

    def bounds(self) -> MapBounds:
        """Return the bounds of the run."""
        return MapBounds(
            in_flight=self.in_flight,
            ahead=2 * WINDOW_LINES,
            silence_s=self.silence_s,
            away_s=self.away_s,
            grace_s=self.grace_s,
            resumes=True,
        )


class BatchReport(NamedTuple):
    """What a run did: lines of the input, of these answered and failed in all, and what this run brought."""

    lines: int
    answered: int
    failed: int
    resumed: int
    tokens: int
    seconds: float


def run_batch(
    connection: Connection,
    source: BinaryIO,
    batch: BatchInput,
    files: BatchFiles,
    settings: BatchSettings,
    progress: ProgressCall = lambda _: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> BatchReport:
    """Answer the lines that have no record yet; `progress` and `is_stopped` are called after every look.

    Raises:
        BatchStopped: it was asked to stop.
        RequestError: the output is of something else.
        ServerError: the server was away for too long.
        WaitTimeout: no job brought anything for too long.
    """
    resumed = files.resume(source, batch.batch_id)
    tasks = BatchTasks(
        source,
        batch.batch_id,
        settings.defaults,
        last=resumed.last,
        place_name=str(files.output.resolve()),
        queues=settings.queues,
    )
    run = MapRun(iter(tasks), connection.keys, connection.ring, settings.bounds())
    meter = MapMeter(batch.num_lines - resumed.done)

    def after_round() -> None:
        files.flush()
        progress(meter.read(run.counts))
        if is_stopped():
            raise BatchStopped("stopped")

    with closing(drive(connection, run, after_round)) as results:
        for result in results:
            record = tasks.record(result)
            files.write(record.text, is_error=record.is_error)
    return _report(batch, resumed, run, meter)


def _report(batch: BatchInput, resumed: Resumed, run: MapRun, meter: MapMeter) -> BatchReport:
    end = meter.read(run.counts)
    failed = resumed.failed + end.failed
    return BatchReport(
        lines=batch.num_lines,
        answered=resumed.done + end.done - failed,
        failed=failed,
        resumed=resumed.done,
        tokens=end.tokens,
        seconds=round(end.seconds, 3),
    )
