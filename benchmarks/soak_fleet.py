"""The workers of a soak: started, killed with SIGKILL, and started again, as a service manager would.

Owns the worker processes and their logs. With the engine `scripted` a worker is the real one (Celery, session,
publisher, leases, reconciler, supervisor) whose engine process has no weights, so that thousands of jobs fit in
minutes; with `tiny` the engine is real too. Neighbour: `soak`, which decides who is killed and when.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoint import LlamaShape, build_checkpoint
from benchmarks.soak_plan import MODEL
from lamella import Client

ROOT = Path(__file__).resolve().parent.parent
TINY = LlamaShape(layers=4, hidden=64, ffn=96, vocab=512, heads=4, kv_heads=2, dtype="float32")
START_S = 120.0
STOP_S = 30.0
SWEEP_S = 0.01  # of the scripted engine


@dataclass(frozen=True)
class WorkerTerms:
    """How each worker runs; `engine` is scripted or tiny."""

    engine: str
    slots: int
    lease_s: float
    max_attempts: int


class SoakFleet:
    """Worker processes of one server; a context manager that leaves none behind."""

    def __init__(self, url: str, terms: WorkerTerms, directory: Path) -> None:
        self._url = url
        self._terms = terms
        self._directory = directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        if terms.engine == "tiny":
            self._build_store()

    def __enter__(self) -> SoakFleet:
        """Return the fleet; nothing runs yet."""
        return self

    def __exit__(self, *error: object) -> None:
        """End what still runs."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_S)

    def start(self, name: str) -> None:
        """Start a worker; returns before it is ready."""
        with (self._directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._command(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def kill(self, name: str) -> None:
        """Kill a worker with SIGKILL, and wait until it is gone."""
        self._processes[name].send_signal(signal.SIGKILL)
        self._processes[name].wait(STOP_S)

    def wait_listed(self, names: list[str]) -> None:
        """Wait until all these workers have told that they live.

        Raises:
            TimeoutError: they have not within `START_S`.
        """
        deadline = time.monotonic() + START_S
        with Client(self._url) as client:
            while not set(names) <= {worker.name for worker in client.workers()}:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not all of {', '.join(names)} came up within {START_S:g} s; see their logs")
                time.sleep(0.1)

    def died(self) -> list[str]:
        """Names of workers that ended without having been killed here."""
        return [name for name, process in self._processes.items() if process.poll() not in (None, -signal.SIGKILL)]

    def log(self, name: str) -> str:
        """What a worker logged, in all its lives."""
        return (self._directory / f"{name}.log").read_text(errors="replace")

    def _command(self, name: str) -> list[str]:
        terms = self._terms
        if terms.engine == "scripted":
            options = [str(terms.slots), str(terms.lease_s), "8.0", str(SWEEP_S), "child"]
            return [
                *(sys.executable, "-m", "tests.worker.scripted_worker", MODEL, self._url, name),
                *(*options, f"worker.max_attempts={terms.max_attempts}"),
            ]
        config = self._directory / "worker.toml"
        config.write_text(f'[worker]\nmodel = "{MODEL}"\nmax_attempts = {terms.max_attempts}\n', encoding="utf-8")
        return [
            *(sys.executable, "-m", "lamella_worker", "--config", str(config), "--name", name, "--device", "cpu"),
            *("--redis-url", self._url, "--store", str(self._directory / "store"), "--ram", "0", "--offline"),
            *("--slots", str(terms.slots), "--lease-s", str(terms.lease_s)),
        ]

    def _build_store(self) -> None:
        from lamella_engine import ShardStore

        source = build_checkpoint(TINY, self._directory / "checkpoint")
        ShardStore(self._directory / "store").ensure(MODEL, source=source)
