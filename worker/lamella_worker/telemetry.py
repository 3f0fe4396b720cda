"""What a worker tells the outside beside its heartbeat: metrics over HTTP, traces over OTLP, where they are wanted.

Owns their lifetimes and who watches the jobs. With nothing configured it watches nothing and opens nothing, and neither
prometheus_client nor opentelemetry is loaded. `process` makes one and hands its `watch` to those who tell.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from lamella_worker.config import WorkerConfig
from lamella_worker.job_watch import JobWatch, JobWatchers
from lamella_worker.worker_error import WorkerError

if TYPE_CHECKING:
    from lamella_worker.engine_sources import EngineSources

log = logging.getLogger(__name__)


class Telemetry:
    """Open from when it is made until `close`.

    Attributes:
        watch: to be told what happens to jobs.
        metrics_address: host:port of the metrics; None where none are served.

    Raises:
        WorkerError: the metrics' port cannot be had, or a package is missing.
    """

    def __init__(self, config: WorkerConfig, worker: str) -> None:
        self._stack = ExitStack()
        self.metrics_address: str | None = None
        watchers: list[JobWatch] = []
        table = config.telemetry
        try:
            if table.metrics_port is not None:
                watchers.append(self._open_metrics(table.metrics_host, table.metrics_port, config.worker.served))
            if table.traces is not None:
                watchers.append(self._open_traces(table.traces, config.worker.served[0], worker))
        except ImportError as error:
            self.close()
            missing = 'pip install "lamella[worker,tracing]"'
            raise WorkerError(f"telemetry needs a package that is not installed ({error}); {missing}") from error
        except BaseException:
            self.close()
            raise
        self.watch = JobWatchers(watchers) if watchers else JobWatch()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tell_of(self, sources: EngineSources) -> None:
        """Add the engine's own figures to the metrics, if there are any."""
        if self.metrics_address is not None:
            from lamella_worker.metrics_engine import EngineCollector

            self._registry.register(EngineCollector(sources))

    def close(self) -> None:
        """Stop serving, and send what traces are left; idempotent."""
        self._stack.close()

    def _open_metrics(self, host: str, port: int, models: tuple[str, ...]) -> JobWatch:
        from prometheus_client import CollectorRegistry, ProcessCollector

        from lamella_worker.metrics_jobs import JobMetrics
        from lamella_worker.metrics_server import MetricsServer, PortTaken

        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        try:
            server = MetricsServer(host, port, self._registry)
        except PortTaken as error:
            raise WorkerError(f"{error}; set telemetry.metrics_port to another one, or to 0 for any") from error
        self._stack.callback(server.close)
        self.metrics_address = server.address
        log.info("metrics on http://%s/metrics", server.address)
        return JobMetrics(self._registry, *models)

    def _open_traces(self, endpoint: str, model: str, worker: str) -> JobWatch:
        from lamella.tracing import open_exporting
        from lamella_worker.job_traces import JobTraces

        provider = open_exporting(endpoint, "lamella-worker")
        self._stack.callback(provider.shutdown)
        log.info("traces to %s", endpoint)
        return JobTraces(provider, model, worker)
