"""One process that brings a model into the store, as its worker sees it: started, listened to, ended.

Owns the process and the thread that reads it. `pull_child` is what runs in it, `pull_keeper` decides what is pulled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

from lamella_worker.channel import ChannelBroken
from lamella_worker.config import EngineTable
from lamella_worker.engine_messages import Open, Progress, Refused, decode_report, encode
from lamella_worker.engine_port import ServedModel
from lamella_worker.engine_process import NOT_FOR_ENGINES

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "lamella_worker.pull_child")
MAX_LINE_BYTES = 100_000
_END_S = 5.0


class PullProcess:
    """A pull that runs from its making on; closed by its owner."""

    def __init__(self, model: str, engine: EngineTable, command: Sequence[str] = COMMAND) -> None:
        env = {name: value for name, value in os.environ.items() if name not in NOT_FOR_ENGINES}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self._progress = Progress("starting", 0, 0)
        self._refusal: str | None = None
        self._reader = threading.Thread(target=self._read, name="pull-reader", daemon=True)
        self._reader.start()
        with contextlib.suppress(OSError):  # it ended at once, which `exit` tells
            stdin = _pipe(self._process.stdin)
            stdin.write(encode(Open((ServedModel(model, model),), engine, "cpu", 0)) + b"\n")
            stdin.flush()

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self._progress

    def outcome(self) -> str | None:
        """None while it runs; then the empty text for success, or why it failed."""
        code = self._process.poll()
        if code is None:
            return None
        self._reader.join(_END_S)
        if code == 0:
            return ""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return self._refusal or f"the process that pulled {how}; its worker's log tells more"

    def close(self) -> None:
        """End the process if it still runs; idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(_END_S)
        self._reader.join(_END_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _read(self) -> None:
        reports = _pipe(self._process.stdout)
        while line := reports.readline(MAX_LINE_BYTES):
            try:
                report = decode_report(line)
            except ChannelBroken as error:
                log.warning("the process that pulls says what cannot be read: %s", error)
                continue
            match report:
                case Progress():
                    self._progress = report
                case Refused(message=message):
                    self._refusal = message
                case _:
                    log.warning("the process that pulls speaks of something else")


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("the process was started without its pipes")
    return pipe
