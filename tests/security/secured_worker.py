"""A real worker process that gets its secrets from the environment only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lamella.client import Client
from tests.waiting import wait_until

PREFIX = "safe:"
MODEL = "tiny-guarded"
LEASE_S = 1.5


class SecuredWorker:
    """One worker; start and stop come in pairs."""

    def __init__(
        self, store: Path, log: Path, environment: Mapping[str, str], options: Sequence[str] = (), model: str = MODEL
    ) -> None:
        self.log_path = log
        self.model = model
        self._store = store
        self._environment = environment
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        command = [sys.executable, "-m", "lamella_worker", "--model", self.model, "--prefix", PREFIX]
        command += ["--store", str(self._store), "--device", "cpu", "--ram", "0", "--slots", "4", "--offline"]
        command += ["--lease-s", str(LEASE_S), "--drain-s", "10", *self._options]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LAMELLA_")}
        with self.log_path.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**inherited, "OMP_NUM_THREADS": "1", **self._environment},
            )

    def wait_until_served(self, url: str) -> None:
        with Client(url, prefix=PREFIX) as client:
            wait_until(lambda: self._is_listed(client), 90.0)

    def wait(self) -> int:
        """Wait for the end that it comes to by itself, and return its exit code."""
        assert self._process is not None
        return self._process.wait(60.0)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self) -> int:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(40.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(40.0)

    def _is_listed(self, client: Client) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        return self.model in {model.name for model in client.models()}
