"""A process that holds pieces of a RAM tier, told what to do line by line; and how tests start one.

It loads the RAM tier without the rest of the engine, which would take seconds to import.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[2] / "engine" / "lamella_engine"
DEADLINE_S = 40.0


class TierProcess:
    """A running process with a RAM tier in `directory`; every order is answered by one line, a fill tells before."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self._orders, self._answers = process.stdin, process.stdout
        self._read = b""

    def tell(self, *order: object) -> None:
        """Give an order, without waiting for it."""
        self._orders.write(json.dumps(order).encode() + b"\n")
        self._orders.flush()

    def answer(self, deadline_s: float = DEADLINE_S) -> list[object]:
        """The next line the process writes."""
        deadline = time.monotonic() + deadline_s
        while b"\n" not in self._read:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no answer within {deadline_s} s"
            read = os.read(self._answers.fileno(), 65536)
            assert read, "the process ended without an answer"
            self._read += read
        line, _, self._read = self._read.partition(b"\n")
        parsed: list[object] = json.loads(line)
        return parsed

    def ask(self, *order: object) -> list[object]:
        """Give an order and wait for the answer."""
        self.tell(*order)
        return self.answer()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait until the process is gone."""
        self._process.kill()
        self._process.wait(timeout=DEADLINE_S)


@contextmanager
def tier_process(directory: Path, *, wait_s: float = 60.0, wrapper: tuple[str, ...] = ()) -> Iterator[TierProcess]:
    """A process with a RAM tier in `directory`, ready; killed at the end of the block."""
    command = [*wrapper, sys.executable, __file__, str(directory), str(wait_s)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        with process:
            started = TierProcess(process)
            try:
                assert started.answer() == ["ready"]
                yield started
            finally:
                process.kill()
    finally:
        process.wait(timeout=DEADLINE_S)


class _Holder:
    """What runs in the process: one method an order, named like it."""

    def __init__(self, directory: Path, wait_s: float) -> None:
        package = types.ModuleType("lamella_engine")
        package.__path__ = [str(PACKAGE)]
        sys.modules["lamella_engine"] = package
        self.warnings: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.warnings.append(record.getMessage())  # type: ignore[method-assign] # a list
        logging.getLogger("lamella_engine").addHandler(handler)
        self.directory = directory
        self.tier = importlib.import_module("lamella_engine.ram_tier").RamTier(directory, pinned=False, wait_s=wait_s)
        self.pieces: dict[str, torch.Tensor] = {}

    def load(self, key: str, nbytes: int, byte: int, halts: bool = False) -> None:
        def fill(view: memoryview) -> None:
            half = nbytes // 2
            view[:half] = bytes([byte]) * half
            _tell("filling")
            if halts:
                sys.stdin.readline()
            view[half:] = bytes([byte]) * (nbytes - half)

        self.pieces[key] = self.tier.load(key, nbytes, fill)
        _tell("loaded", sorted(set(self.pieces[key].tolist())))

    def limit(self, nbytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        _tell("limited")

    def poke(self, key: str, index: int, byte: int) -> None:
        self.pieces[key][index] = byte
        _tell("poked")

    def peek(self, key: str, index: int) -> None:
        _tell(int(self.pieces[key][index]))

    def shared(self) -> None:
        _tell(self.tier.nbytes, self.tier.shared_bytes, self.warnings)

    def close(self) -> None:
        self.tier.close()
        _tell("closed", sorted(os.listdir(self.directory)))


def _tell(*words: object) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    holder = _Holder(Path(sys.argv[1]), float(sys.argv[2]))
    _tell("ready")
    for order in map(json.loads, sys.stdin):
        getattr(holder, order[0])(*order[1:])
