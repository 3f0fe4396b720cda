"""All engines of a worker in one process of their own, with the shape of engines in this one.

Owns the engines' life together: opened, waited for, closed; and which report is whose. `child_engine` knows an engine's
sequences, `supervisor` keeps the process running, `local_host` is the other kind of host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from lamella_engine.errors import EngineError
from lamella_worker.channel import ChannelBroken
from lamella_worker.child_engine import ChildEngine
from lamella_worker.engine_messages import Answer, Beat, Sweep
from lamella_worker.engine_port import ChildState
from lamella_worker.engine_process import KILL_S, EngineProcess
from lamella_worker.supervisor import EngineSpec, Supervisor
from lamella_worker.worker_error import WorkerError
from lamella_worker.worker_table import WorkerTable

STOP_S = 2 * KILL_S
_LOOK_S = 0.5


class ChildHost:
    """The engines of a worker, in a child process that is started again when it dies; closed by its owner.

    Attributes:
        engines: one a model, the same ones through all restarts.
    """

    def __init__(self, spec: EngineSpec, limits: WorkerTable) -> None:
        self._supervisor = Supervisor(spec, limits, self)
        self.engines: Mapping[str, ChildEngine] = {
            model.name: ChildEngine(model.name, self._supervisor) for model in spec.models
        }
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._stop_s = limits.drain_s / 4 + STOP_S

    @classmethod
    def open(
        cls, spec: EngineSpec, limits: WorkerTable, is_called_off: Callable[[], bool] = lambda: False
    ) -> ChildHost:
        """Start the process, and wait until its engines are open.

        Raises:
            WorkerError: they cannot open, or are called off.
        """
        host = cls(spec, limits)
        host._supervisor.start()
        try:
            while not host.wait_ready(_LOOK_S):
                if (failure := host._supervisor.failure) is not None:
                    raise WorkerError(failure)
                if is_called_off():
                    raise WorkerError("the worker stops before its engines are open")
        except BaseException:
            host.close()
            raise
        return host

    @property
    def state(self) -> ChildState:
        """How the process stands."""
        return self._supervisor.state

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the engines are open; False if they are not after `timeout_s` seconds, or will not be."""
        with self._changed:
            self._changed.wait_for(lambda: self._supervisor.ready.is_set() or self._has_ended(), timeout_s)
        return self._supervisor.ready.is_set()

    def close(self) -> None:
        """End the process, the polite way first; live sequences end without an event. Idempotent.

        Raises:
            EngineError: it does not end.
        """
        self._closed.set()
        for engine in self.engines.values():
            engine.close()
        self._wake()
        if not self._supervisor.stop(self._stop_s):
            raise EngineError(f"the engine process did not end within {self._stop_s:.0f} s")

    def hear(self, process: EngineProcess, report: Answer | Sweep | Beat) -> None:
        """Pass a report on to the engine that it is about; called by the supervisor, in the thread that reads."""
        engine = self.engines.get(report.model)
        if engine is None:
            raise ChannelBroken("a report is about a model that was not asked for")
        engine.hear(process, report)

    def lost(self, why: str) -> None:
        """The process is gone with all its sequences; called by the supervisor."""
        for engine in self.engines.values():
            engine.lost(why)
        self._wake()

    def changed(self) -> None:
        """Wake those who wait; called by the supervisor."""
        for engine in self.engines.values():
            engine.changed()
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _has_ended(self) -> bool:
        return self._closed.is_set() or self._supervisor.failure is not None
