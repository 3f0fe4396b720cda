"""The one thread that computes: it opens the model and then sweeps.

A thread that computes on a CPU brings a team of its own along, and two teams on the same cores get in each other's way
(libgomp lets threads sleep instead of spin once there are more of them than cores, and products take up to 1.5 times
as long). So whatever computes for an engine runs here, from measuring the device on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from lamella_engine.errors import EngineError

Result = TypeVar("Result")
_POLL_S = 0.5  # how soon a caller notices that the thread has died


class _Work(Generic[Result]):
    """Something to run and what became of it; `undo` takes the result if the caller has gone by then."""

    def __init__(self, run: Callable[[], Result], undo: Callable[[Result], object]) -> None:
        self._run = run
        self._undo = undo
        self._lock = threading.Lock()
        self._is_abandoned = False
        self.is_done = threading.Event()
        self.error: BaseException | None = None
        self.result: Result | None = None

    def run(self) -> None:
        try:
            result = self._run()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            self.error = error
        else:
            with self._lock:
                self.result = None if self._is_abandoned else result
                is_abandoned = self._is_abandoned
            if is_abandoned:
                self._undo(result)
        finally:
            self.is_done.set()

    def abandon(self) -> None:
        """The caller does not wait any longer."""
        with self._lock:
            self._is_abandoned = True
            result, self.result = self.result, None
        if result is not None:
            self._undo(result)


class SweepThread:
    """A daemon thread that runs what it is given, one after the other; given to one engine, which ends it."""

    def __init__(self) -> None:
        self._works: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lamella-sweep", daemon=True)
        self._thread.start()

    def call(self, run: Callable[[], Result], undo: Callable[[Result], object]) -> Result:
        """What `run` returns or raises; a caller that is interrupted leaves its result to `undo`.

        Raises:
            EngineError: the thread has ended.
        """
        work = _Work(run, undo)
        self._works.put(work.run)
        try:
            while not work.is_done.wait(timeout=_POLL_S):
                if not self._thread.is_alive():
                    raise EngineError("the sweep thread has ended")
        except BaseException:
            work.abandon()
            raise
        if work.error is not None:
            raise work.error
        assert work.result is not None, "what is run here returns something"
        return work.result

    def start(self, run: Callable[[], object]) -> None:
        """Begin `run`, which handles its own errors, and return; nothing comes after it."""
        self._works.put(run)
        self._works.put(None)

    def end(self) -> None:
        """Let the thread end once it has run what it was given."""
        self._works.put(None)

    def join(self, timeout: float) -> bool:
        """Wait for the end; whether it has come."""
        self._thread.join(timeout=timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                run = self._works.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if run is None:
                return
            run()
