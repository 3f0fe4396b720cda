"""`lamella batch run`: a file of requests, answered into another; stops cleanly and goes on where it was."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, BinaryIO

import typer
from rich.console import Console

from lamella.batch_body import BodyDefaults
from lamella.batch_files import BatchFiles, BatchInput, errors_path, identify
from lamella.batch_form import SubmitForm
from lamella.batch_run import AWAY_S, SILENCE_S, BatchReport, BatchSettings, BatchStopped, run_batch
from lamella.cli import options
from lamella.cli.complete import complete_model
from lamella.cli.output import echo_json
from lamella.client import Client
from lamella.connection import Connection, check_seconds
from lamella.errors import LamellaError, RequestError, ServerError, WaitTimeout
from lamella.map_bar import duration, figures, shown_progress
from lamella.map_meter import MapProgress, ProgressCall
from lamella.map_run import MOST_IN_FLIGHT
from lamella.messages import check_model_name

EXIT_SOME_FAILED = 3
EXIT_STOPPED = 130
GO_ON = "the same command goes on from there"
LINE_EVERY_S = 15.0  # of progress, where no bar can be drawn

batch = typer.Typer(name="batch", help="Answer a file of requests.", pretty_exceptions_enable=False)


@batch.callback()
def _batch() -> None:
    """Answer a file of requests."""


@batch.command()
def run(  # noqa: PLR0913  one argument for each option
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests, one JSON object a line.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Answers; errors go to a file beside it.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Model for all lines, in place of what they name.", autocompletion=complete_model
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="For lines that do not say (256).")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="For lines that do not say (0, greedy).")
    ] = None,
    in_flight: Annotated[
        int | None,
        typer.Option(
            "--in-flight", min=1, max=MOST_IN_FLIGHT, help="Jobs under way at most. Default: twice the workers' slots."
        ),
    ] = None,
    queue: Annotated[bool, typer.Option("--queue", help="Queue jobs even if no worker serves their model.")] = False,
    tag: Annotated[
        str, typer.Option("--tag", help="Part of the batch's identity: with another one all is asked anew.")
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Empty the output first.")] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Seconds without a word from any job after which to give up.")
    ] = SILENCE_S,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Answer every line of IN: answers to OUT, what failed to OUT's errors file, both in the order of the lines.

    Lines are OpenAI's batch requests, or plain: {"prompt": "..."} or {"messages": [...]} with sampling keys beside.
    Ctrl-C cancels what is under way; the same command goes on where it stopped, also after a crash. Exit code 3: done,
    but some lines have errors.
    """
    check_seconds("--timeout", timeout_s)
    _check_model(model)
    with ExitStack() as stack:
        client = stack.enter_context(options.open_client(redis_url, prefix))
        fallback = _fallback_model(client, model, is_queued=queue)
        defaults = BodyDefaults(model, max_tokens, temperature, fallback)
        file = stack.enter_context(_open_input(source, output))
        asked = identify(file, json.dumps([model, max_tokens, temperature, tag]))
        files = stack.enter_context(BatchFiles(output))
        if overwrite:
            files.clear()
        settings = BatchSettings(SubmitForm(defaults, queues=queue), in_flight, timeout_s, AWAY_S)
        report = _run(client.connection, file, asked, files, settings)
    _tell(report, output, as_json=as_json)


def _run(
    connection: Connection, source: BinaryIO, asked: BatchInput, files: BatchFiles, settings: BatchSettings
) -> BatchReport:
    """Run the batch; where it ends early, say how to go on."""
    with _stop_on_signal() as is_stopped:
        try:
            with _progress() as show:
                return run_batch(connection, source, asked, files, settings, show, is_stopped)
        except BatchStopped:
            files.flush()
            typer.echo(f"stopped: {files.num_records} of {asked.num_lines} lines are done; {GO_ON}", err=True)
            raise typer.Exit(EXIT_STOPPED) from None
        except (ServerError, WaitTimeout) as error:
            raise type(error)(f"{error}\nWhat is done is written; {GO_ON}") from error


def _open_input(source: Path, output: Path) -> BinaryIO:
    if not source.is_file():
        raise RequestError(f"{source} is no file; a batch is read twice, so it cannot come through a pipe")
    for written in (output, errors_path(output)):
        if written.exists() and written.samefile(source):
            raise RequestError(f"{written} is the input; choose another output")
    return open(source, "rb")


def _check_model(model: str | None) -> None:
    if model is None:
        return
    try:
        check_model_name(model)
    except ValueError as error:
        raise RequestError(f"--model {error}") from error


def _fallback_model(client: Client, model: str | None, *, is_queued: bool) -> str | None:
    """Return the model of lines that name none: the only one served. With no worker at all there is nothing to run."""
    served = client.models()
    if not served and not is_queued:
        raise LamellaError(
            f"no worker is running, so nothing can be answered; start one with `lamella worker --model "
            f"{model or 'NAME'}`, or give --queue to let the jobs wait for it"
        )
    return served[0].name if len(served) == 1 else None


def _tell(report: BatchReport, output: Path, *, as_json: bool) -> None:
    if as_json:
        files = {"output": str(output), "errors": str(errors_path(output))}
        echo_json({**report._asdict(), **files})
    speed = report.tokens / report.seconds if report.seconds > 0 else 0.0
    parts = [f"{report.lines} lines: {report.answered} answered"]
    if report.failed:
        parts.append(f"{report.failed} failed (see {errors_path(output)})")
    if report.resumed:
        parts.append(f"{report.resumed} of them by earlier runs")
    parts.append(f"{report.tokens} tokens in {duration(report.seconds)}, {speed:.1f} tokens/s")
    typer.echo(", ".join(parts), err=True)
    if report.failed:
        raise typer.Exit(EXIT_SOME_FAILED)


@contextmanager
def _progress() -> Generator[ProgressCall, None, None]:
    """Yield what shows the progress on stderr: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines().show
        return
    with shown_progress(True) as show:
        yield show


class _Lines:
    """Progress where no bar can be drawn."""

    def __init__(self) -> None:
        self._told_at = time.monotonic()

    def show(self, now: MapProgress) -> None:
        """Write a line if the last one is long ago."""
        if time.monotonic() - self._told_at >= LINE_EVERY_S:
            self._told_at = time.monotonic()
            typer.echo(f"{now.done} of {now.total} lines, {figures(now)}", err=True)


@contextmanager
def _stop_on_signal() -> Generator[Callable[[], bool], None, None]:
    """Yield whether SIGINT or SIGTERM came; a second one interrupts at once."""
    asked = False

    def handle(signal_number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        typer.echo("stopping: jobs under way are cancelled ...", err=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
