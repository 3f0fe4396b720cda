"""A service for the length of one command: a private server and one worker in a temporary directory."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

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
from lamella.errors import LamellaError

READY_TIMEOUT_S = 600.0
DRAIN_S = 10.0
LOG_LINES = 15


@contextmanager
def temporary_service(model: str, *, device: str, store: str | None) -> Iterator[str]:
    """Yield the URL of a server whose one worker serves `model`; everything is stopped and removed afterwards.

    Raises:
        LamellaError: the model cannot be had or the worker did not become ready.
    """
    require_worker_packages()
    server_program()
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        pull_model(model, store_option(store))
        typer.echo(f"starting a worker for {model} ...", err=True)
        with (
            tempfile.TemporaryDirectory(prefix="lamella-") as directory,
            EmbeddedServer(Path(directory) / "server") as server,
            open(Path(directory) / "worker.log", "w+b") as log,
        ):
            worker = WorkerProcess(WorkerSpec(server.url, model, device, store_option(store)), output=log)
            try:
                worker.start()
                _wait_until_served(worker, server.url, model, Path(log.name))
                yield server.url
            finally:
                drain_all([worker], DRAIN_S)
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_until_served(worker: WorkerProcess, url: str, model: str, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with Client(url) as client:
        while not any(served.name == model for served in client.models()):
            code = worker.exit_code()
            if code is not None:
                raise LamellaError(
                    f"the worker ended while starting ({how_it_ended(code)}); its log ends with:\n{_tail(log)}"
                )
            if time.monotonic() > deadline:
                raise LamellaError(
                    f"the worker was not ready within {READY_TIMEOUT_S:g} s; its log ends with:\n{_tail(log)}"
                )
            time.sleep(0.1)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])


def _leave(signal_number: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an orderly end of the command."""
    raise SystemExit(128 + signal_number)
