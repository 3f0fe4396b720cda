"""Real worker processes around scripted engines, for faults that a real model would make slow."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lamella.client import Client
from tests.waiting import wait_until

START_S = 60.0


class ScriptedFleet:
    """Starts workers of the model ``tiny`` and ends what is left of them."""

    def __init__(self, url: str, logs: Path) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._url = url
        self._logs = logs

    def start(
        self,
        *names: str,
        slots: int = 8,
        lease_s: float = 1.0,
        drain_s: float = 8.0,
        sweep_s: float = 0.01,
        isolation: str = "none",
        failpoints: str = "",
        settings: Sequence[str] = (),
        url: str | None = None,
        clock_shift_s: float = 0.0,
    ) -> None:
        """Start workers side by side, and wait until all are listed; `settings` are of the form worker.hang_s=2.0.

        With `url` they reach the server in another way than the test does; with `clock_shift_s` their clocks are wrong.
        """
        program = ["-m", "tests.worker.scripted_worker"]
        if clock_shift_s:
            program = ["-m", "tests.faults.lying_clock", str(clock_shift_s), "tests.worker.scripted_worker"]
        for name in names:
            options = [str(slots), str(lease_s), str(drain_s), str(sweep_s), isolation, *settings]
            with (self._logs / f"{name}.log").open("ab") as output:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, *program, "tiny", url or self._url, name, *options],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=Path(__file__).resolve().parent.parent.parent,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "LAMELLA_FAILPOINTS": failpoints},
                )
        with Client(self._url) as client:
            wait_until(lambda: set(names) <= {worker.name for worker in client.workers()}, START_S)

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait(40)
