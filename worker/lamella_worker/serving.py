"""What a worker serves now: the open engines, a publisher for each, and how that changes while it runs.

Owns the host of the engines and the publishers' lives; keeps the totals of engines that were closed, so that no figure
falls. `session` finds engines here, `heartbeat` and metrics their figures; `process` decides when models change, and
sees to it that no job runs then.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from lamella_engine.errors import EngineError
from lamella_engine.sequence_types import EngineCounters, EngineFacts
from lamella_worker.delivery import Delivery
from lamella_worker.engine_port import ChildState, EngineAway, EngineHost, OpenHost, ServedModel, SweepEngine
from lamella_worker.engine_totals import NO_COUNTERS, ended, summed, together
from lamella_worker.job_table import JobTable
from lamella_worker.job_watch import NO_WATCH, JobWatch
from lamella_worker.publisher import Publisher
from lamella_worker.worker_error import WorkerError

log = logging.getLogger(__name__)

JOIN_S = 3.0
CLOSE_S = 90.0
_LOOK_S = 0.1


class Serving:
    """The models of a worker; safe to ask from any thread, changed by one at a time.

    Args:
        models: what is served first.
        open_host: opens engines for a list of models.
    """

    def __init__(self, models: Sequence[ServedModel], open_host: OpenHost) -> None:
        self._open_host = open_host
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._host: EngineHost | None = None
        self._models: tuple[ServedModel, ...] = ()
        self._facts: dict[str, EngineFacts] = {}
        self._past: dict[str, EngineCounters] = {}
        self._publishers: list[Publisher] = []
        self._make_publisher: Callable[[str, SweepEngine], Publisher] | None = None
        self._is_closed = threading.Event()
        self._open(tuple(models))

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """What is served, or was until engines that are being opened replace theirs."""
        with self._lock:
            return self._models

    @property
    def names(self) -> tuple[str, ...]:
        """The names that clients know."""
        return tuple(model.name for model in self.models)

    @property
    def state(self) -> ChildState | None:
        """How the engines' process stands; None where they have none of their own, or none is open."""
        host = self._host
        return None if host is None else host.state

    def find(self, model: str) -> SweepEngine | None:
        """The engine of a model; None where it is not served now."""
        host = self._host
        return None if host is None else host.engines.get(model)

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until engines are open; False if none is after `timeout_s` seconds."""
        host = self._host
        if host is None:
            self._is_closed.wait(min(timeout_s, _LOOK_S))
            return False
        return host.wait_ready(timeout_s)

    def facts(self, model: str) -> EngineFacts:
        """What the model's engine is, or was when it was open last."""
        engine = self.find(model)
        if engine is not None:
            try:
                return engine.facts
            except EngineAway:
                log.debug("the engine of %s is away", model)
        return self._facts[model]

    def counters(self, model: str) -> EngineCounters:
        """The totals of all engines that the model had here."""
        with self._lock:
            past = self._past.get(model, NO_COUNTERS)
            engine = self.find(model)
            return past if engine is None else summed(past, engine.counters())

    def all_counters(self) -> EngineCounters:
        """The totals of all models, also of those that are served no more."""
        with self._lock:
            models = {*self._past, *(model.name for model in self._models)}
        return together([self.counters(model) for model in sorted(models)])

    def publish(
        self, table: JobTable, delivery: Delivery, on_end: Callable[[bool], None], watch: JobWatch = NO_WATCH
    ) -> None:
        """Start to deliver what the engines' sweeps bring, from now on also that of engines that are opened later.

        `on_end` is called if it ends through an error, with True.
        """

        def failed(has_failed: bool) -> None:
            if has_failed:
                on_end(True)

        self._make_publisher = lambda model, engine: Publisher(engine, table, delivery, failed, watch, model)
        self._start_publishers()

    def change(self, models: Sequence[ServedModel]) -> str | None:
        """Close the engines and open others; where they cannot be opened the old ones are, and why is returned.

        No job may run meanwhile.

        Raises:
            WorkerError: neither the new nor the old ones can be opened; nothing is.
        """
        with self._changing:
            before, trouble = self.models, None
            self._shut()
            try:
                self._open(tuple(models))
            except WorkerError as error:
                trouble = str(error)
                log.error("%s; the worker goes on with %s", trouble, ", ".join(model.name for model in before))
                self._open(before)
            self._start_publishers()
            return trouble

    def close(self) -> None:
        """Close the engines, and let the publishers end; idempotent."""
        self._is_closed.set()
        if not self._changing.acquire(timeout=CLOSE_S):
            log.error("engines are being opened still; the end of the worker's process ends them")
            return
        try:
            self._shut()
        finally:
            self._changing.release()

    def _open(self, models: tuple[ServedModel, ...]) -> None:
        if self._is_closed.is_set():
            raise WorkerError("the worker stops; no engine is opened any more")
        host = self._open_host(models, self._is_closed.is_set)
        facts = {name: engine.facts for name, engine in host.engines.items()}
        with self._lock:
            self._facts.update(facts)
            self._models = models
            self._host = host

    def _start_publishers(self) -> None:
        host = self._host
        if self._make_publisher is None or host is None:
            return
        for model, engine in host.engines.items():
            publisher = self._make_publisher(model, engine)
            self._publishers.append(publisher)
            publisher.start()

    def _shut(self) -> None:
        host = self._host
        if host is None:
            return
        try:
            host.close()
        except EngineError:
            log.exception("the engines did not close in time")
        publishers, self._publishers = self._publishers, []
        for publisher in publishers:
            publisher.join(JOIN_S)
        with self._lock:
            self._keep_totals(host.engines)
            self._host = None

    def _keep_totals(self, engines: Mapping[str, SweepEngine]) -> None:
        for model, engine in engines.items():
            self._past[model] = ended(summed(self._past.get(model, NO_COUNTERS), engine.counters()))
