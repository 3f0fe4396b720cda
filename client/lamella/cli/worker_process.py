"""One worker as a child process: started, watched, started again when it dies, drained at the end.

Owns the command line of a worker and the rule for restarts: pauses that double from 1 to 30 s, and an end after five
deaths in a row within a minute of starting each.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from lamella.child_process import start_child
from lamella.errors import ConfigError, LamellaError
from lamella.secret_sources import only_url

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0
MAX_EARLY_DEATHS = 5
EXIT_BAD_SETTING = 2
WORKER_PACKAGES = ("celery", "torch", "transformers")


@dataclass(frozen=True)
class WorkerSpec:
    """What to run: the server's URL, the model, and the options that were given."""

    redis_url: str
    model: str
    device: str = "auto"
    store: str | None = None
    slots: int | None = None
    vram: str | None = None
    ram: str | None = None

    def command(self) -> list[str]:
        """Return the worker's command line; the URL, which may hold a password, travels in the environment."""
        command = [sys.executable, "-m", "lamella_worker", "--model", self.model, "--device", self.device]
        given = {"--store": self.store, "--slots": self.slots, "--vram": self.vram, "--ram": self.ram}
        for option, value in given.items():
            if value is not None:
                command += [option, str(value)]
        return command


class WorkerProcess:
    """A worker's process; `look` is called now and then and starts it again when it has died."""

    def __init__(self, spec: WorkerSpec, output: IO[bytes] | None = None) -> None:
        self.spec = spec
        self.restarts = 0
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._early_deaths = 0
        self._next_start: float | None = None

    @property
    def pid(self) -> int | None:
        """Process id, None while it waits to be started again."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process."""
        self._process = start_child(
            self.spec.command(),
            death_signal=signal.SIGKILL,
            output=self._output,
            environment=only_url(self.spec.redis_url),
        )
        self._started_at = time.monotonic()
        self._next_start = None

    def exit_code(self) -> int | None:
        """Return the exit code if the process has ended."""
        return self._process.poll() if self._process else None

    def look(self) -> str | None:
        """Notice a death and, after its pause, start again; return what there is to tell.

        Raises:
            LamellaError: it dies again and again, or its settings cannot work.
        """
        now = time.monotonic()
        if self._next_start is not None:
            if now < self._next_start:
                return None
            self.start()
            self.restarts += 1
            return f"worker on {self.spec.device} started again (process {self.pid})"
        code = self.exit_code()
        if code is None:
            return None
        self._process = None
        self._early_deaths = self._early_deaths + 1 if now - self._started_at < STEADY_S else 1
        if code == EXIT_BAD_SETTING:
            raise LamellaError(f"the worker on {self.spec.device} cannot run with these settings; its message is above")
        if self._early_deaths >= MAX_EARLY_DEATHS:
            raise LamellaError(
                f"the worker on {self.spec.device} died {self._early_deaths} times in a row ({how_it_ended(code)}); "
                "its messages are above"
            )
        pause_s = min(FIRST_PAUSE_S * 2 ** (self._early_deaths - 1), LONGEST_PAUSE_S)
        self._next_start = now + pause_s
        return f"worker on {self.spec.device} ended ({how_it_ended(code)}); starting it again in {pause_s:g} s"

    def terminate(self) -> None:
        """Ask the worker to drain."""
        self._next_start = None
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait_or_kill(self, deadline: float) -> bool:
        """Wait for the end until `deadline` (monotonic), then kill; return whether it ended by itself."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout=max(0.0, deadline - time.monotonic()))
            return True
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=10.0)
            return False
        finally:
            self._process = None


def drain_all(workers: Sequence[WorkerProcess], grace_s: float) -> bool:
    """Drain all workers at once, kill those left after `grace_s`; return whether all ended by themselves."""
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + grace_s
    try:
        ended = [worker.wait_or_kill(deadline) for worker in workers]
    except KeyboardInterrupt:
        ended = [worker.wait_or_kill(time.monotonic()) for worker in workers]
    return all(ended)


def require_worker_packages() -> None:
    """Raise ConfigError if this installation cannot run a worker."""
    missing = [name for name in WORKER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"running a worker needs packages that are not installed ({', '.join(missing)}); "
            'run `pip install "lamella[worker]"`'
        )


def pull_model(model: str, store: str | None) -> None:
    """Fetch the model and build its shards if they are not in the store; shows its own progress on stderr.

    Raises:
        LamellaError: it cannot be had; the reason is on stderr.
    """
    command = [sys.executable, "-m", "lamella_engine", "pull", model]
    if store is not None:
        command += ["--store", store]
    process = start_child(command, death_signal=signal.SIGTERM)
    try:
        while process.poll() is None:
            try:
                process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                continue
    except BaseException:
        process.kill()
        process.wait(timeout=10.0)
        raise
    if process.returncode != 0:
        raise LamellaError(f"the model {model!r} could not be made ready; the reason is above")


def how_it_ended(code: int) -> str:
    """Return an exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def store_option(store: str | None) -> str | None:
    """Return the store as an absolute path, if given; children may run in another directory."""
    return os.path.abspath(os.path.expanduser(store)) if store is not None else None
