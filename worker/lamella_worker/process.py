"""One worker process, put together: engine, session, threads, Celery; and taken apart in the opposite order.

Owns the lifetimes. Imported only after the device is pinned: with it comes the engine, or its process. `cli` calls
`serve` and turns its result into an exit code.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from celery import signals
from celery.apps.worker import Worker
from kombu.utils.url import maybe_sanitize_url

from lamella.key_ring import KeyRing, load_key_ring
from lamella.keys import Keys, queue_name
from lamella.messages import EngineProcessInfo, WorkerInfo
from lamella_engine.errors import EngineError
from lamella_worker.app import make_app
from lamella_worker.child_engine import ChildEngine
from lamella_worker.config import WorkerConfig
from lamella_worker.device import PinnedDevice
from lamella_worker.drain import EXIT_FAILURE, Drain
from lamella_worker.engine_port import SweepEngine
from lamella_worker.engine_sources import EngineSources
from lamella_worker.heartbeat import Heartbeat, WorkerFacts
from lamella_worker.job_table import JobTable
from lamella_worker.lease_keeper import LeaseKeeper
from lamella_worker.log_context import ProcessLabels
from lamella_worker.log_setup import label_logs
from lamella_worker.publisher import Publisher
from lamella_worker.reconciler import Reconciler
from lamella_worker.registry import Registry, open_redis
from lamella_worker.server_check import refuse_hopeless
from lamella_worker.session import Session
from lamella_worker.supervisor import ChildState, EngineSpec
from lamella_worker.tasks import add_generate_task
from lamella_worker.telemetry import Telemetry

log = logging.getLogger(__name__)

REGISTRY_TIMEOUT_S = 5.0
RECONCILER_TIMEOUT_S = 2.0
JOIN_S = 3.0


class LamellaWorker(Worker):  # type: ignore[misc]  # celery publishes no types
    """Celery's worker without its banner, its logging set-up and its signal handlers, which are ours."""

    def install_platform_tweaks(self, worker: Any) -> None:
        """Leave the signals to `drain`, which has taken them over already."""

    def stats(self) -> dict[str, object]:
        """Return Celery's figures without the password that a unix socket's address carries."""
        figures: dict[str, object] = super().stats()
        broker = figures.get("broker")
        if isinstance(broker, dict):
            figures["broker"] = {key: maybe_sanitize_url(value) for key, value in broker.items()}
        return figures

    def set_process_status(self, info: str) -> None:
        """Leave the process's title alone."""


def serve(config: WorkerConfig, device: PinnedDevice) -> int:
    """Open the engine and serve jobs until told to stop; returns the exit code.

    Raises:
        ConfigError: the model is not allowed, or the encryption keys cannot be used; nothing was fetched.
        WorkerError: the server refuses this worker, or the engine cannot open. Nothing was taken from the queue.
    """
    name = worker_name(config, device)
    label_logs(ProcessLabels(config.telemetry.log_format, name, config.worker.model))
    opened_as = config.security.admitted(config.worker.model)
    ring = load_key_ring(config.security.encryption_keys_file, "security.encryption_keys_file")
    refuse_hopeless(config.redis.url.get_secret_value(), config.redis.prefix, REGISTRY_TIMEOUT_S)
    log.info("lamella worker %s, pid %d", version("lamella"), os.getpid())
    log.info("model %s%s", config.worker.model, f" (as {opened_as})" if opened_as != config.worker.model else "")
    if ring is not None:
        log.info("encrypted jobs are served, with %r", ring)
    log.info("device %s (%s)", device.label, device.why)
    with Telemetry(config, name) as telemetry:
        return serve_engine(_open(config, device), config, device, telemetry, ring)


def _open(config: WorkerConfig, device: PinnedDevice) -> SweepEngine:
    model = config.security.admitted(config.worker.model)
    if config.worker.isolation == "child":
        spec = EngineSpec(model, config.engine, device.engine_device)
        return ChildEngine.open(spec, config.worker)
    from lamella_worker.open_engine import open_engine  # the one place that loads torch

    return open_engine(model, config.engine, device.engine_device)


def worker_name(config: WorkerConfig, device: PinnedDevice) -> str:
    """Return the worker's name: the one it was given, else host-device-pid."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname()) or "host"
    return config.worker.name or f"{host}-{device.short}-{os.getpid()}"


def serve_engine(
    engine: SweepEngine,
    config: WorkerConfig,
    device: PinnedDevice,
    telemetry: Telemetry | None = None,
    ring: KeyRing | None = None,
) -> int:
    """Serve jobs with an open engine until told to stop, then close it and `telemetry`; returns the exit code."""
    name = worker_name(config, device)
    facts = engine.facts
    log.info("plan: %d layers, %d bytes, %s, %d slots", facts.num_layers, facts.size_bytes, facts.dtype, config.slots)
    log.info("queue %s, worker %s", queue_name(config.worker.model), name)
    keys = Keys(config.redis.prefix, config.security.keep_s)
    with ExitStack() as stack:
        stack.callback(device.release)
        stack.callback(_close_engine, engine)
        client = open_redis(config.redis.url.get_secret_value(), REGISTRY_TIMEOUT_S)
        stack.callback(client.close)
        impatient = open_redis(config.redis.url.get_secret_value(), RECONCILER_TIMEOUT_S)
        stack.callback(impatient.close)
        telemetry = stack.enter_context(telemetry or Telemetry(config, name))
        watch = telemetry.watch
        table = JobTable()
        child = engine if isinstance(engine, ChildEngine) else None
        wait_ready = child.wait_ready if child else lambda timeout_s: True
        session = Session(engine, Registry(client, keys, ring), table, config, name, wait_ready, watch)
        drain = Drain(session, config.worker.drain_s)

        def on_publisher_end(has_failed: bool) -> None:
            session.give_up()
            if has_failed:
                drain.request("the publisher failed", EXIT_FAILURE)

        publisher = Publisher(engine, table, session.delivery, on_publisher_end, watch)
        keeper = LeaseKeeper(table, session.delivery, config.worker.lease_s)
        process = (lambda: _process_info(child.state)) if child else None
        served, label = config.worker.model, device.label
        worker_facts = WorkerFacts(name, served, label, lambda: engine.facts, engine.counters, table, process)
        worker_facts.metrics_address = telemetry.metrics_address

        def info() -> WorkerInfo:
            told = worker_facts.info(is_draining=session.is_draining)
            return told.model_copy(update={"key_ids": ring.key_ids}) if ring is not None else told

        sources = EngineSources(info, engine.counters, lambda: engine.facts.plan)
        telemetry.tell_of(sources)
        heartbeat = Heartbeat(impatient, keys, name, info)
        reconciler = Reconciler(impatient, Registry(impatient, keys), name, config.worker.lease_s, watch)

        drain.start()
        drain.install()
        stack.callback(drain.close, JOIN_S)
        stack.callback(publisher.join, JOIN_S)
        stack.callback(_close_engine, engine)  # ends the publisher's iterator
        publisher.start()
        keeper.start()
        stack.callback(keeper.stop, JOIN_S)
        heartbeat.start()
        stack.callback(heartbeat.stop, JOIN_S)
        return _run_celery(config, session, reconciler, name, sources)


def _process_info(state: ChildState) -> EngineProcessInfo:
    return EngineProcessInfo(
        pid=state.pid,
        state="failed" if state.has_failed else "ready" if state.is_ready else "starting",
        restarts=state.restarts,
        max_sequences=state.max_sequences,
        trouble=state.trouble,
    )


def _run_celery(
    config: WorkerConfig, session: Session, reconciler: Reconciler, name: str, sources: EngineSources
) -> int:
    app = make_app(config, reconciler)
    app.lamella_sources = sources
    add_generate_task(app, session)
    signals.setup_logging.connect(_keep_logging)
    worker = LamellaWorker(
        app=app,
        hostname=f"{name}@{socket.gethostname()}",
        pool_cls="threads",
        concurrency=config.slots,
        task_events=True,
        loglevel="INFO",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
    )
    worker.start()
    session.give_up()  # Celery may stop by itself; then no task may go on waiting
    return int(worker.exitcode or 0)


def _keep_logging(**_: Any) -> None:
    """Celery sets up no logging while this is connected."""


def _close_engine(engine: SweepEngine) -> None:
    try:
        engine.close()
    except EngineError:
        log.exception("the engine did not close in time")
