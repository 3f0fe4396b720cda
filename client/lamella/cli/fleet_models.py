"""``lamella models where`` and ``lamella models pull --on``: models of the whole service, not of this host.

The other commands of ``lamella models`` are the engine's, for this host's store; `plugins` tells which is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lamella import operations, pulls
from lamella.candidates import Candidate, rank
from lamella.cli import options
from lamella.cli.output import echo_columns, echo_json, printable, size
from lamella.connection import Connection, Privacy
from lamella.errors import LamellaError, ServerError
from lamella.pull_messages import PullState, PullStatus

LOOK_S = 0.5
TAKE_S = 30.0
LINE_EVERY_S = 5.0
TIMEOUT_S = 10.0

app = typer.Typer(name="models", no_args_is_help=True, pretty_exceptions_enable=False)


def is_asked(arguments: Sequence[str]) -> bool:
    """Whether these arguments of ``lamella models`` are for a command of this module."""
    command = arguments[0] if arguments else ""
    return command == "where" or (command == "pull" and any(each.split("=")[0] == "--on" for each in arguments))


@app.command()
def where(
    name: Annotated[str, typer.Argument(help="The model.")],
    as_json: options.AsJson = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Show which workers serve a model, whose hosts have its shards, and which could take it; best first."""
    connection = Connection(redis_url, prefix, TIMEOUT_S, Privacy(None, None))
    try:
        ranked = rank(name, connection.run(operations.workers(connection.keys)))
        waiting = connection.run(operations.waiting(connection.keys, sorted({each.model for each in ranked})))
    finally:
        connection.close()
    if as_json:
        told = [{**each.as_dict(), "waiting": waiting.get(each.model, 0)} for each in ranked]
        echo_json({"model": name, "workers": told})
        return
    if not ranked:
        typer.echo("no worker is running")
        return
    rows = [_row(each, waiting) for each in ranked]
    echo_columns(("WORKER", "HOST", "DEVICE", "MEMORY", "CAN", "RUNNING", "WAITING", "OF MODEL"), rows)
    if (advice := ranked[0].advice(name)) is not None:
        typer.echo(advice)


def _row(each: Candidate, waiting: dict[str, int]) -> tuple[str, ...]:
    memory = "-" if each.memory_bytes is None else size(each.memory_bytes)
    busy = f"{each.running}/{each.slots}"
    return each.worker, each.host, each.device, memory, each.words, busy, str(waiting.get(each.model, 0)), each.model


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="The model: a name that the worker's host finds at a peer or the hub.")],
    on: Annotated[str, typer.Option("--on", help="The worker on whose host the model is needed.")],
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Whether the worker is to serve it then.")] = True,
    as_json: options.AsJson = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Have a worker bring a model into its host's store, and show how far it is; Ctrl-C does not end it."""
    connection = Connection(redis_url, prefix, TIMEOUT_S, Privacy(None, None))
    try:
        ask_id = connection.run(pulls.ask(connection.keys, on, name, serve=serve))
        status = _follow(connection, on, name, ask_id)
    finally:
        connection.close()
    if as_json:
        echo_json({"worker": on, "model": name, **status.model_dump(mode="json")})
    else:
        typer.echo(printable(status.message), err=status.state is PullState.FAILED)
    if status.state is PullState.FAILED:
        raise typer.Exit(1)


def _follow(connection: Connection, worker: str, name: str, ask_id: str) -> PullStatus:
    asked_at, seen = time.monotonic(), False
    try:
        with _Shown() as shown:
            while True:
                look = connection.run(pulls.look(connection.keys, worker, name, ask_id))
                if look.status is not None:
                    seen = True
                    shown.show(look.status)
                    if look.status.state.is_final:
                        return look.status
                else:
                    _check_gone(worker, name, look, seen, time.monotonic() - asked_at)
                time.sleep(LOOK_S)
    except KeyboardInterrupt:
        raise LamellaError(
            f"interrupted; worker {worker!r} goes on with {name}. The same command follows it again"
        ) from None


def _check_gone(worker: str, name: str, look: pulls.Look, seen: bool, waited_s: float) -> None:
    again = "What was fetched is kept; the same command goes on with it, also on another worker of that host"
    if not look.is_worker_alive:
        raise ServerError(f"worker {worker!r} died or was stopped before it had {name}. {again}")
    if seen:
        raise ServerError(f"worker {worker!r} was started anew and has forgotten the request for {name}. {again}")
    if waited_s > TAKE_S:
        raise ServerError(
            f"worker {worker!r} lives but did not take the request for {name} within {TAKE_S:.0f} s; it may be of an "
            "older version. Update it, or run `lamella models pull` on its host"
        )


class _Shown:
    """How far a pull is: a bar on a terminal, a line every few seconds elsewhere; on standard error."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        self._bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console)
        self._is_bar = console.is_terminal
        self._tasks = {"": self._bar.add_task("waiting", total=None)} if self._is_bar else {}
        self._told: tuple[str, float] = ("", float("-inf"))

    def __enter__(self) -> _Shown:
        if self._is_bar:
            self._bar.start()
        return self

    def __exit__(self, *problem: object) -> None:
        if self._is_bar:
            self._bar.stop()

    def show(self, status: PullStatus) -> None:
        """Show a status."""
        phase = printable(status.phase)
        if self._is_bar:
            if phase not in self._tasks:
                self._tasks[phase] = self._bar.add_task(phase, total=status.total_bytes)
            if phase:
                self._bar.update(self._tasks[phase], completed=status.done_bytes, total=status.total_bytes)
            return
        now = time.monotonic()
        words = phase or printable(status.message) or status.state.value
        if status.state.is_final or (words == self._told[0] and now - self._told[1] < LINE_EVERY_S):
            return
        self._told = (words, now)
        figures = f": {size(status.done_bytes)} of {size(status.total_bytes)}" if status.total_bytes else ""
        typer.echo(f"{words}{figures}", err=True)
