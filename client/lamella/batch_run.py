"""Runs a batch: every line of a file as a job, answers and errors written in the order of the lines.

Owns how the parts come together over a synchronous client. What survives a crash is in the files and on the server:
running the same again goes on where it was. Neighbours: `batch_tasks`, `batch_files`, `map_sync`; above it the command
``lamella batch run`` and the batches of the HTTP gateway.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import BinaryIO, NamedTuple

from lamella import operations
from lamella.batch_files import BatchFiles, BatchInput, Resumed
from lamella.batch_form import LineForm, SubmitForm
from lamella.batch_lines import SUBMIT_URLS, BatchUrl
from lamella.batch_tasks import WINDOW_LINES, BatchTasks
from lamella.connection import Connection
from lamella.errors import LamellaError
from lamella.map_closing import Closing
from lamella.map_meter import MapMeter, ProgressCall
from lamella.map_run import MapBounds, MapRun, Submit
from lamella.map_sync import drive

AWAY_S = 600.0
GRACE_S = 20.0  # above the time after which a lost worker is off the list, and another may be on it
SILENCE_S = 6 * 3600.0


class BatchStopped(LamellaError):
    """The run was asked to stop; what is done is written, the rest was cancelled or left to the next run."""


class BatchSettings(NamedTuple):
    """How a batch is run; see `MapBounds` for the spans of time, and for `leaves`.

    `form` says what the lines mean, `urls` what they may ask for, `place_name` what tells the jobs of this batch from
    those of an equal one (None: where its output is), `submit` how a job is sent. `closing` is asked after every look
    whether the run is to end before its lines do.
    """

    form: LineForm = SubmitForm()
    in_flight: int | None = None
    silence_s: float = SILENCE_S
    away_s: float = AWAY_S
    grace_s: float = GRACE_S
    leaves: bool = False
    urls: tuple[BatchUrl, ...] = SUBMIT_URLS
    place_name: str | None = None
    submit: Submit = operations.submit
    closing: Callable[[], Closing | None] = lambda: None

    def bounds(self) -> MapBounds:
        """Return the bounds of the run."""
        return MapBounds(
            in_flight=self.in_flight,
            ahead=2 * WINDOW_LINES,
            silence_s=self.silence_s,
            away_s=self.away_s,
            grace_s=self.grace_s,
            resumes=True,
            leaves=self.leaves,
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
        settings.form,
        last=resumed.last,
        place_name=settings.place_name or str(files.output.resolve()),
        urls=settings.urls,
    )
    run = MapRun(iter(tasks), connection.keys, connection.ring, settings.bounds(), settings.submit)
    meter = MapMeter(batch.num_lines - resumed.done)

    def after_round() -> None:
        files.flush()
        progress(meter.read(run.counts))
        if is_stopped():
            raise BatchStopped("stopped")
        _close(run, settings)

    _close(run, settings)
    with closing(drive(connection, run, after_round)) as results:
        for result in results:
            record = tasks.record(result)
            if record is not None:
                files.write(record.text, is_error=record.is_error)
    return _report(batch, resumed, run, meter)


def _close(run: MapRun, settings: BatchSettings) -> None:
    if (asked := settings.closing()) is not None:
        run.close(asked)


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
