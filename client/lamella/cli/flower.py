"""Flower, the web page about Celery's workers, as a child process on loopback behind a password."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import subprocess
import sys
from typing import IO

from lamella.child_process import start_child, stop_child
from lamella.errors import ConfigError
from lamella.secret_sources import only_url

AUTH_VARIABLE = "FLOWER_BASIC_AUTH"
MAX_TASKS = 10_000


class Flower:
    """Flower's process; `login` is FLOWER_BASIC_AUTH (user:password), or a password drawn for this run."""

    def __init__(self, redis_url: str, port: int, output: IO[bytes] | None = None) -> None:
        if importlib.util.find_spec("flower") is None:
            raise ConfigError('Flower is not installed; run `pip install "lamella[worker,flower]"`')
        self.url = f"http://127.0.0.1:{port}"
        self.login = os.environ.get(AUTH_VARIABLE) or f"lamella:{secrets.token_urlsafe(12)}"
        self._redis_url = redis_url
        self._port = port
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process."""
        command = [sys.executable, "-m", "celery", "-A", "lamella_worker.monitor", "flower"]
        command += ["--address=127.0.0.1", f"--port={self._port}", "--read_only=True", f"--max_tasks={MAX_TASKS}"]
        self._process = start_child(
            command,
            death_signal=signal.SIGKILL,
            output=self._output,
            environment={**only_url(self._redis_url), AUTH_VARIABLE: self.login},
        )

    def exit_code(self) -> int | None:
        """Return the exit code if the process has ended."""
        return self._process.poll() if self._process else None

    def stop(self) -> None:
        """Stop the process; harmless when not running."""
        if self._process is not None:
            stop_child(self._process, grace_s=5.0)
            self._process = None
