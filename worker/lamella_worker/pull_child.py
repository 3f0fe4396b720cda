"""The process that brings a model into the store for a worker: ``python -m lamella_worker.pull_child``.

Reads one order, tells how far it is, and ends: 0 when the shards are there, 1 with a word why not. Loads torch, which
its worker must not. Ends with its worker, whose end of the pipe then closes; what was fetched stays for the next time.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import BinaryIO

from lamella_worker.channel import ChannelBroken
from lamella_worker.engine_messages import Open, Progress, Refused, Report, decode_order, encode, plain

REPORT_EVERY_S = 0.25
MAX_ORDER_BYTES = 100_000


def main() -> int:
    """Carry out the order on standard input; reports go to standard output, everything else to standard error."""
    reports = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    try:
        order = decode_order(sys.stdin.buffer.readline(MAX_ORDER_BYTES))
    except ChannelBroken as error:
        return _refuse(reports, str(error))
    if not isinstance(order, Open) or len(order.models) != 1:
        return _refuse(reports, "an order to pull names one model")
    threading.Thread(target=_end_with_worker, name="pull-parent", daemon=True).start()
    return _pull(order, reports)


def _pull(order: Open, reports: BinaryIO) -> int:
    from lamella_engine import ShardStore  # loads torch
    from lamella_engine.errors import EngineError
    from lamella_engine.peer_address import Peers

    table = order.engine
    try:
        store = ShardStore(table.store, peers=Peers.named(table.peers))
        store.ensure(order.models[0].opened_as, offline=table.offline, progress=_Reporter(reports))
    except EngineError as error:
        return _refuse(reports, str(error))
    except (OSError, MemoryError) as error:
        return _refuse(reports, f"{type(error).__name__}: {error}")
    return 0


class _Reporter:
    """Tells how far it is, a few times a second."""

    def __init__(self, reports: BinaryIO) -> None:
        self._reports = reports
        self._phase, self._told_at = "", float("-inf")

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if phase != self._phase or done_bytes >= total_bytes or now - self._told_at >= REPORT_EVERY_S:
            self._phase, self._told_at = phase, now
            _tell(self._reports, Progress(phase, done_bytes, total_bytes))


def _refuse(reports: BinaryIO, why: str) -> int:
    _tell(reports, Refused(plain(why), is_out_of_memory=False))
    return 1


def _tell(reports: BinaryIO, report: Report) -> None:
    reports.write(encode(report) + b"\n")


def _end_with_worker() -> None:
    while os.read(0, 4096):  # not the buffered file, whose lock the end of the interpreter wants
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
