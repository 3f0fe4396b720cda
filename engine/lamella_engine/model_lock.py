"""One builder per model and host: a file lock that tells those who wait whom they wait for."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lamella_engine.errors import ModelError

logger = logging.getLogger(__name__)

_REMIND_S = 30.0  # how often a waiting process says so in its log


class ModelLock:
    """The lock of one model in a store; the kernel frees it when its holder dies."""

    def __init__(self, directory: Path, model_directory_name: str) -> None:
        self._path = directory / f"{model_directory_name}.lock"
        self._owner_path = directory / f"{model_directory_name}.owner"

    @contextlib.contextmanager
    def held(self, name: str, deadline_s: float) -> Iterator[None]:
        """Hold the lock of the model `name` inside a ``with``; wait for it at most `deadline_s` seconds.

        Raises:
            ModelError: another process holds it for longer; it is named.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._path)
        self._acquire(lock, name, deadline_s)
        try:
            self._owner_path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            yield
        finally:
            self._owner_path.unlink(missing_ok=True)
            lock.release()

    def _acquire(self, lock: FileLock, name: str, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        while True:
            remaining_s = deadline - time.monotonic()
            try:
                lock.acquire(timeout=max(0.0, min(_REMIND_S, remaining_s)), poll_interval=0.05)
            except Timeout:
                if time.monotonic() >= deadline:
                    raise ModelError(
                        f"{self._owner()} has been working on the shards of {name} for over {deadline_s:.0f} s; "
                        "wait for it or end it, then try again"
                    ) from None
                logger.info("waiting for %s, which works on the shards of %s", self._owner(), name)
            else:
                return

    def _owner(self) -> str:
        try:
            owner = json.loads(self._owner_path.read_text())
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
