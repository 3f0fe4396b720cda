"""`lamella up`: the embedded server and its workers in one command, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from lamella.cli import options
from lamella.cli.flower import Flower
from lamella.cli.worker_process import (
    WorkerProcess,
    WorkerSpec,
    drain_all,
    how_it_ended,
    pull_model,
    require_worker_packages,
    store_option,
)
from lamella.client import Client
from lamella.embedded import EmbeddedServer, server_program
from lamella.errors import LamellaError, RequestError, ServerError
from lamella.messages import check_model_name
from lamella.service_state import announce_service, state_dir, withdraw_service

LOOK_S = 0.25
DRAIN_S = 30.0  # above a worker's own drain_s (20), so that a worker ends by itself


def up(  # noqa: PLR0913 - a command has as many arguments as options
    model: Annotated[str, typer.Option("--model", "-m", help="The model to serve.")],
    device: Annotated[
        list[str] | None, typer.Option("--device", help="cpu, cuda:N or auto; repeatable, one worker each.")
    ] = None,
    slots: Annotated[int | None, typer.Option("--slots", min=1, help="Jobs that share a worker's sweeps.")] = None,
    vram: Annotated[str | None, typer.Option("--vram", help="GPU memory a worker takes: 4GiB, 80%, auto.")] = None,
    ram: Annotated[str | None, typer.Option("--ram", help="Host memory for weights, likewise.")] = None,
    store: options.Store = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Where the server keeps jobs between runs.")
    ] = None,
    flower: Annotated[bool, typer.Option("--flower", help="Also run Flower, on loopback behind a password.")] = False,
    flower_port: Annotated[int, typer.Option("--flower-port", min=1, max=65535, help="Flower's port.")] = 5555,
) -> None:
    """Run everything on this machine: a private server, one worker for each device, and Flower if asked for.

    Runs until Ctrl-C or SIGTERM; then the workers drain, unfinished jobs are kept, and the server stops. A second
    Ctrl-C does not wait for the drain.
    """
    try:
        check_model_name(model)
    except ValueError as error:
        raise RequestError(f"--model {error}") from error
    require_worker_packages()
    server_program()
    pull_model(model, store_option(store))
    with _stop_on_signal() as stop, EmbeddedServer(data_dir or state_dir() / "server") as server, ExitStack() as stack:
        stack.callback(withdraw_service, announce_service(server.url))
        _say(f"server  {server.url}")
        devices = device or ["auto"]
        specs = [WorkerSpec(server.url, model, name, store_option(store), slots, vram, ram) for name in devices]
        workers = [WorkerProcess(spec) for spec in specs]
        stack.callback(_drain, workers)
        for worker in workers:
            worker.start()
            _say(f"worker  {model} on {worker.spec.device} (process {worker.pid})")
        page = _start_flower(server.url, flower_port, stack) if flower else None
        _watch(stop, server, workers, page)


def _watch(stop: threading.Event, server: EmbeddedServer, workers: list[WorkerProcess], page: Flower | None) -> None:
    with Client(server.url, timeout_s=5.0) as client:
        announced = 0
        while not stop.wait(LOOK_S):
            if not server.is_running:
                raise LamellaError(f"the server ended by itself; see {server.data_dir / 'server.log'}")
            for worker in workers:
                if news := worker.look():
                    _say(news)
            if page is not None and (code := page.exit_code()) is not None:
                raise LamellaError(f"Flower ended ({how_it_ended(code)}); is its port taken? Choose with --flower-port")
            if announced < len(workers):
                announced = _announce_ready(client, workers, announced)


def _announce_ready(client: Client, workers: list[WorkerProcess], before: int) -> int:
    try:
        ready = len(client.workers())
    except ServerError:
        return before
    if ready > before:
        _say(f'ready   {ready} of {len(workers)} workers; try: lamella chat "Hello"')
    return max(ready, before)


def _drain(workers: list[WorkerProcess]) -> None:
    _say("stopping: workers finish their sweep and give their jobs back ...")
    if not drain_all(workers, DRAIN_S):
        _say("a worker did not end in time and was killed; its jobs go on with the next start")


def _start_flower(redis_url: str, port: int, stack: ExitStack) -> Flower:
    page = Flower(redis_url, port)
    page.start()
    stack.callback(page.stop)
    _say(f"flower  {page.url} (login {page.login})")
    return page


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGINT, SIGTERM and SIGHUP set; a second one interrupts the drain."""
    stop = threading.Event()

    def handle(signal_number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    typer.echo(text, err=True)
