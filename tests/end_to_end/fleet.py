"""Real worker processes for tests: started when asked for, kept between tests, all gone at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lamella.client import Client
from tests.waiting import wait_until

START_S = 90.0
LEASE_S = 1.5
DRAIN_S = 30.0


class Fleet:
    """Workers of one server and one store; `logs` holds a file for each."""

    def __init__(self, url: str, store: Path, logs: Path) -> None:
        self.url = url
        self._store = store
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started = 0

    def serve(self, client: Client, model: str, num_workers: int) -> list[str]:
        """Have that many live workers for a model, and return their names."""
        names = self._alive(model)
        while len(names) < num_workers:
            names.append(self._start(model))
        wait_until(lambda: set(names) <= self._listed(client, model), START_S)
        return names

    def signal(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def wait(self, name: str, deadline_s: float) -> int:
        """Wait for a worker to end, and return its exit code."""
        return self._processes[name].wait(deadline_s)

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        """End every worker, the polite way first."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(DRAIN_S + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(40)

    def _alive(self, model: str) -> list[str]:
        return [n for n, process in self._processes.items() if n.startswith(f"{model}-") and process.poll() is None]

    def _listed(self, client: Client, model: str) -> set[str]:
        for name, process in self._processes.items():
            if name.startswith(f"{model}-") and process.poll() not in (None, 0, -signal.SIGKILL):
                raise AssertionError(f"worker {name} ended with {process.returncode}:\n{self.log(name)}")
        return {worker.name for worker in client.workers() if worker.model.name == model and not worker.draining}

    def _start(self, model: str) -> str:
        self._started += 1
        name = f"{model}-{self._started}"
        options = [
            "--device",
            "cpu",
            "--ram",
            "0",
            "--slots",
            "8",
            "--lease-s",
            str(LEASE_S),
            "--drain-s",
            str(DRAIN_S),
        ]
        self._processes[name] = run_worker(
            ["--model", model, "--name", name, "--redis-url", self.url, "--store", str(self._store), *options],
            self._logs / f"{name}.log",
        )
        return name


def run_worker(arguments: Sequence[str], log: Path, *, is_offline: bool = True) -> subprocess.Popen[bytes]:
    """Start ``python -m lamella_worker``, output in a file, one compute thread so that several share a host."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "lamella_worker", *arguments, *(["--offline"] if is_offline else [])],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
