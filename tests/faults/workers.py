"""Real workers of the tiny model, each with its failpoints, and a look at their engine processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lamella.client import Client
from lamella.messages import EngineProcessInfo, WorkerInfo
from lamella_worker.failpoints import VARIABLE
from tests.waiting import wait_until

START_S = 90.0
DRAIN_S = 10.0


class Workers:
    """Starts workers on one server, and ends what is left of them."""

    def __init__(self, url: str, store: Path, logs: Path) -> None:
        self.url = url
        self._store = store
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self,
        model: str,
        name: str,
        *options: str,
        failpoints: str = "",
        settings: Sequence[str] = ("max_restarts = 100",),
    ) -> str:
        """Start a worker if none of that name runs, and wait until it is listed; returns its name."""
        if (process := self._processes.get(name)) is not None and process.poll() is None:
            return name
        config = self._logs / f"{name}.toml"
        config.write_text(
            "\n".join(["[worker]", f'model = "{model}"', "lease_s = 2.0", f"drain_s = {DRAIN_S}", *settings])
        )
        with (self._logs / f"{name}.log").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                [
                    *(
                        sys.executable,
                        "-m",
                        "lamella_worker",
                        "--config",
                        str(config),
                        "--name",
                        name,
                        "--device",
                        "cpu",
                    ),
                    *("--redis-url", self.url, "--store", str(self._store), "--ram", "0", "--offline", *options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", VARIABLE: failpoints},
            )
        wait_until(lambda: self._is_listed(name), START_S)
        return name

    def info(self, name: str) -> WorkerInfo | None:
        """What the worker says of itself, None if nothing."""
        with Client(self.url) as client:
            return next((worker for worker in client.workers() if worker.name == name), None)

    def engine(self, name: str) -> EngineProcessInfo:
        """The worker's engine process, whose engine is open."""
        return wait_until(lambda: self._ready_engine(name), START_S)

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text(errors="replace")

    def stop(self, name: str) -> None:
        """End one worker, the polite way first."""
        process = self._processes.pop(name, None)
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(DRAIN_S + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(40)

    def close(self) -> None:
        for name in list(self._processes):
            self.stop(name)

    def _is_listed(self, name: str) -> bool:
        code = self._processes[name].poll()
        if code is not None:
            raise AssertionError(f"worker {name} ended with {code}:\n{self.log(name)}")
        return self.info(name) is not None

    def _ready_engine(self, name: str) -> EngineProcessInfo | None:
        info = self.info(name)
        process = info.engine_process if info is not None else None
        return process if process is not None and process.state == "ready" else None
