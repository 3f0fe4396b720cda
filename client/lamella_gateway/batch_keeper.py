"""Sees that every batch is run by somebody: looks for those that nobody runs, and runs a bounded number of them.

Owns the threads, one for each batch that runs here. Any gateway of a directory may run a batch, one at a time; what a
gateway that died left is found by the others, or by its next start. Neighbours: `batch_store` (the locks),
`batch_execution` (what is run), `service` (starts and closes it).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import BinaryIO

from lamella.batch_run import BatchStopped
from lamella.connection import Connection
from lamella.errors import LamellaError, RequestError
from lamella_gateway.api_error import ApiError
from lamella_gateway.batch_execution import BatchExecution, Stores
from lamella_gateway.batch_store import BatchStore
from lamella_gateway.file_store import FileStore
from lamella_gateway.settings import Settings

LOOK_EVERY_S = 0.5
SWEEP_EVERY_S = 600.0
RETRY_S = 5.0
STOP_S = 15.0
TIMEOUT_S = 10.0

log = logging.getLogger(__name__)
_Pair = tuple[str, str]


class BatchKeeper:
    """Started and closed with the gateway."""

    def __init__(self, settings: Settings, batches: BatchStore, files: FileStore) -> None:
        self._settings = settings
        self._batches = batches
        self._files = files
        self._connection: Connection | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._running: dict[_Pair, threading.Thread] = {}
        self._not_before: dict[_Pair, float] = {}
        self._swept_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="batch-keeper", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def wake(self) -> None:
        """Look now: there is a new batch, or one that is to be cancelled."""
        self._wake.set()

    def close(self) -> None:
        """End: what runs is left to the next gateway, its jobs go on. Harmless when repeated."""
        self._stop.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_S)
        deadline = time.monotonic() + STOP_S
        for thread in self._running.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._connection is not None:
            self._connection.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._look()
            except (LamellaError, ApiError, OSError, ValueError) as error:
                log.warning("batches are looked for again later: %s", error)
            self._wake.wait(LOOK_EVERY_S)
            self._wake.clear()

    def _look(self) -> None:
        self._running = {pair: thread for pair, thread in self._running.items() if thread.is_alive()}
        now = time.monotonic()
        if now - self._swept_at >= SWEEP_EVERY_S:
            self._swept_at = now
            self._files.sweep()
            self._batches.sweep()
        active = self._batches.active()
        self._not_before = {pair: at for pair, at in self._not_before.items() if pair in set(active)}
        while len(self._running) < self._settings.max_batches and (chosen := self._next(active)) is not None:
            active.remove(chosen)
            self._begin(chosen)

    def _next(self, active: list[_Pair]) -> _Pair | None:
        """Return the oldest batch of the owners with the fewest that run here."""
        now = time.monotonic()
        waiting = [p for p in active if p not in self._running and self._not_before.get(p, now) <= now]
        busy = Counter(owner for owner, _ in self._running)
        return min(waiting, key=lambda pair: (busy[pair[0]], pair[1]), default=None)

    def _begin(self, pair: _Pair) -> None:
        lock = self._batches.lock(*pair)
        if lock is None:
            if not self._batches.place(*pair).exists():
                self._batches.retire(*pair)
            return
        thread = threading.Thread(target=self._execute, args=(pair, lock), name=pair[1], daemon=True)
        self._running[pair] = thread
        thread.start()

    def _execute(self, pair: _Pair, lock: BinaryIO) -> None:
        with lock:
            try:
                self._run_batch(pair)
            except BatchStopped:
                log.info("batch=%s is left to the next gateway", pair[1])
            except (LamellaError, ApiError, OSError) as error:
                log.warning("batch=%s is gone on with in %g s: %s", pair[1], RETRY_S, error)
                self._not_before[pair] = time.monotonic() + RETRY_S
        self._wake.set()

    def _run_batch(self, pair: _Pair) -> None:
        record = self._batches.read(*pair)
        if record is None:
            return
        execution = BatchExecution(Stores(self._batches, self._files, self._connected()), record, self._stop.is_set)
        try:
            execution.run()
        except RequestError as error:
            log.error("batch=%s failed: %s", pair[1], error)
            execution.fail("batch_unreadable", "what was written of this batch cannot be gone on with; make it again")
        except (LamellaError, ApiError, OSError):
            raise
        except Exception:
            log.exception("batch=%s failed", pair[1])
            execution.fail("internal_error", "the gateway failed; its log says why")

    def _connected(self) -> Connection:
        if self._stop.is_set():
            raise BatchStopped("stopped")
        if self._connection is None:
            self._connection = Connection(self._settings.redis_url, self._settings.prefix, TIMEOUT_S)
        return self._connection
