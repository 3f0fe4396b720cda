"""Between the thread that sweeps and the one consumer of its events: a few batches, each taken once.

Owns the bound and both waits. A consumer that is slow stalls the sweeps (`engine`), or, where several engines share a
thread, leaves the turn to the others (`engine_group`); nothing is dropped.
"""

from __future__ import annotations

import queue
import threading

from lamella_engine.sequence_types import SweepEvents

MAX_UNDELIVERED = 2  # batches that nobody took yet
_POLL_S = 0.2


class Outbox:
    """At most MAX_UNDELIVERED batches, one a sweep.

    Args:
        stop: ends a wait for room.
        wake: notified when there is room again; None where `put` may wait for it.
    """

    def __init__(self, stop: threading.Event, wake: threading.Condition | None = None) -> None:
        self._stop = stop
        self._wake = wake
        self._batches: queue.Queue[SweepEvents] = queue.Queue(maxsize=MAX_UNDELIVERED)

    @property
    def is_full(self) -> bool:
        """`put` would wait."""
        return self._batches.full()

    def put(self, batch: SweepEvents) -> None:
        """Add a batch, once there is room; dropped if the engine stops meanwhile."""
        while not self._stop.is_set():
            try:
                return self._batches.put(batch, timeout=_POLL_S)
            except queue.Full:
                continue

    def take(self, poll_s: float) -> SweepEvents:
        """The next batch, or an empty one after `poll_s` seconds."""
        try:
            batch = self._batches.get(timeout=poll_s)
        except queue.Empty:
            return SweepEvents(())
        if self._wake is not None:
            with self._wake:
                self._wake.notify()
        return batch
