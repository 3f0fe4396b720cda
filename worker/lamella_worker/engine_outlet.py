"""The engine process's way out for the events of one engine, and the rule by which that engine counts as broken.

Owns the thread that takes the events, and the room that the worker has for them: a sweep's events are sent only while
there is room; else the engine's own outbox fills and its sweeps stall, as they do in one process. `engine_server` has
one for each engine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lamella_engine.errors import EngineError
from lamella_engine.sequence_types import SequenceFinished, SequenceTokens, SweepEvents
from lamella_worker.engine_messages import Beat, Report, Sweep
from lamella_worker.engine_port import CREDIT, ENGINE_ERROR, SweepEngine

log = logging.getLogger(__name__)

BEAT_S = 0.25
POLL_S = 0.5
FAILED_SWEEPS = 3  # in a row; then the engine is opened anew
_SHARD_WORD = "ShardError"
_DEVICE_WORDS = ("CUDA error", "HIP error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "cudaError", "device-side assert")
_PASSING_WORDS = ("out of memory", "ALLOC_FAILED")  # of the device too, but they leave it usable


class EngineOutlet:
    """Sends what one engine's sweeps bring.

    Args:
        model: the name that the worker knows it by.
        engine: whose events are taken.
        report: sends to the worker; callable from any thread.
        stop: set once nothing more is to be sent.
        broken: called when the engine cannot go on, with why.
    """

    def __init__(
        self,
        model: str,
        engine: SweepEngine,
        report: Callable[[Report], None],
        stop: threading.Event,
        broken: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self._model = model
        self._send = report
        self._stop = stop
        self._broken = broken
        self._credit = threading.Semaphore(CREDIT)
        self._is_stalled = False
        self._failed_sweeps = 0
        self._thread = threading.Thread(target=self._send_events, name="engine-events", daemon=True)

    def start(self) -> None:
        """Start taking events."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, once `stop` is set."""
        self._thread.join(timeout_s)

    def taken(self) -> None:
        """The worker has room for one sweep more."""
        self._credit.release()

    def beat(self) -> Beat:
        """A sign of life."""
        return Beat(self._model, self.engine.counters(), self._is_stalled)

    def _send_events(self) -> None:
        try:
            for batch in self.engine.events(poll_s=POLL_S):
                if self._stop.is_set():
                    return
                if batch.events and self._wait_for_room():
                    # First, so that no job comes back to an engine that is about to end.
                    self._judge(batch)
                    self._send(Sweep(self._model, batch.events, self.engine.counters(), batch.sweep_seconds))
        except EngineError as error:
            self._broken(str(error))
        except Exception as error:
            log.exception("the engine's events cannot be sent")
            self._broken(f"{type(error).__name__}: {error}")

    def _wait_for_room(self) -> bool:
        while not self._credit.acquire(timeout=BEAT_S):
            self._is_stalled = True
            if self._stop.is_set():
                return False
        self._is_stalled = False
        return True

    def _judge(self, batch: SweepEvents) -> None:
        """End the process where its device, or every sweep, fails: what is opened anew may work."""
        failed = [
            event.error or ""
            for event in batch.events
            if isinstance(event, SequenceFinished) and event.error_code == ENGINE_ERROR
        ]
        if not failed:
            if any(isinstance(event, SequenceTokens) for event in batch.events):
                self._failed_sweeps = 0
            return
        self._failed_sweeps += 1
        is_lost = any(word in failed[0] for word in _DEVICE_WORDS) and not any(w in failed[0] for w in _PASSING_WORDS)
        if is_lost:
            self._broken(f"the device failed and is lost to this process: {failed[0]}")
        elif _SHARD_WORD in failed[0]:
            self._broken(f"a shard is not to be trusted any more, opening checks them all: {failed[0]}")
        elif self._failed_sweeps >= FAILED_SWEEPS:
            self._broken(f"{self._failed_sweeps} sweeps in a row failed, the last one so: {failed[0]}")
