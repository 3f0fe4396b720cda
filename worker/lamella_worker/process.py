"""One worker process, put together: engines, session, threads, Celery; and taken apart in the opposite order.

Owns the lifetimes, and the change from one list of models to another. Imported only after the device is pinned: with it
come the engines, or their process. `cli` calls `serve` and turns its result into an exit code.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from itertools import combinations
from typing import Any, NamedTuple

from celery import signals
from celery.apps.worker import Worker
from kombu.utils.url import maybe_sanitize_url
from pydantic import ValidationError

from lamella.collector import spare_started
from lamella.errors import ConfigError
from lamella.key_ring import KeyRing, load_key_ring
from lamella.keys import Keys, queue_name
from lamella.messages import WorkerInfo
from lamella_worker.app import make_app
from lamella_worker.child_host import ChildHost
from lamella_worker.config import WorkerConfig
from lamella_worker.consumer import PatientConsumer
from lamella_worker.device import PinnedDevice
from lamella_worker.drain import EXIT_FAILURE, Drain
from lamella_worker.engine_port import EngineHost, OpenHost, ServedModel
from lamella_worker.engine_sources import EngineSources
from lamella_worker.failpoints import of_worker
from lamella_worker.heartbeat import Heartbeat, WorkerFacts
from lamella_worker.host_facts import HostFacts
from lamella_worker.job_table import JobTable
from lamella_worker.lease_keeper import LeaseKeeper
from lamella_worker.local_host import LocalHost
from lamella_worker.log_context import ProcessLabels
from lamella_worker.log_setup import label_logs
from lamella_worker.model_slots import ModelSlots
from lamella_worker.pull_keeper import PullKeeper
from lamella_worker.reconciler import Reconciler
from lamella_worker.registry import Registry, open_redis
from lamella_worker.server_check import refuse_hopeless
from lamella_worker.serving import Serving
from lamella_worker.session import Session
from lamella_worker.subscriptions import Subscriptions, ThreadPool
from lamella_worker.supervisor import EngineSpec
from lamella_worker.tasks import add_generate_task
from lamella_worker.telemetry import Telemetry
from lamella_worker.worker_error import WorkerError

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
    """Open the engines and serve jobs until told to stop; returns the exit code.

    Raises:
        ConfigError: a model is not allowed, or the encryption keys or failpoints cannot be used; nothing was fetched.
        WorkerError: the server refuses this worker, or the engines cannot open. Nothing was taken from the queue.
    """
    name = worker_name(config, device)
    label_logs(ProcessLabels(config.telemetry.log_format, name, ",".join(config.worker.served)))
    models = admitted_models(config, config.worker.served)
    ring = load_key_ring(config.security.encryption_keys_file, "security.encryption_keys_file")
    _check_failpoints()
    refuse_hopeless(config.redis.url.get_secret_value(), config.redis.prefix, REGISTRY_TIMEOUT_S)
    log.info("lamella worker %s, pid %d", version("lamella"), os.getpid())
    for model in models:
        log.info("model %s%s", model.name, f" (as {model.opened_as})" if model.opened_as != model.name else "")
    if ring is not None:
        log.info("encrypted jobs are served, with %r", ring)
    log.info("device %s (%s)", device.label, device.why)
    with Telemetry(config, name) as telemetry:
        serving = Serving(models, host_opener(config, device))
        return WorkerProcess(serving, config, device, telemetry, ring).run()


def _check_failpoints() -> None:
    try:
        of_worker()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def admitted_models(config: WorkerConfig, names: Sequence[str]) -> tuple[ServedModel, ...]:
    """The models of those names, with the revisions that they are pinned to.

    Raises:
        ConfigError: one is not allowed, is no model's name, or two names mean the same model.
    """
    table = config.worker.model_validate({"models": tuple(names)})
    shares = config.worker.shares
    models = [ServedModel(name, config.security.admitted(name), shares.get(name, 1.0)) for name in table.models]
    for first, second in combinations(models, 2):
        if first.opened_as == second.opened_as:
            raise ConfigError(
                f"{first.name!r} and {second.name!r} are the same model, {first.opened_as!r}; serve it under one name"
            )
    return tuple(models)


def host_opener(config: WorkerConfig, device: PinnedDevice) -> OpenHost:
    """What opens engines on this worker's device, where its settings say."""

    def open_host(models: tuple[ServedModel, ...], is_called_off: Callable[[], bool]) -> EngineHost:
        if config.worker.isolation == "child":
            spec = EngineSpec(models, config.engine, device.engine_device)
            return ChildHost.open(spec, config.worker, is_called_off)
        from lamella_worker.open_engine import open_engines  # the one place that loads torch

        return LocalHost(open_engines(models, config.engine, device.engine_device))

    return open_host


def worker_name(config: WorkerConfig, device: PinnedDevice) -> str:
    """Return the worker's name: the one it was given, else host-device-pid."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname()) or "host"
    return config.worker.name or f"{host}-{device.short}-{os.getpid()}"


class Change(NamedTuple):
    """What became of a call of `WorkerProcess.serve_models`: what is served now, and why that is not what was asked."""

    models: tuple[str, ...]
    trouble: str | None


class WorkerProcess:
    """One worker around engines that are open; `run` it once.

    Args:
        serving: what is served; closed by `run`.
        config, device: as everywhere.
        telemetry: closed by `run`; None makes one.
        ring: the keys of encrypted jobs.
    """

    def __init__(
        self,
        serving: Serving,
        config: WorkerConfig,
        device: PinnedDevice,
        telemetry: Telemetry | None = None,
        ring: KeyRing | None = None,
    ) -> None:
        self.name = worker_name(config, device)
        self._serving = serving
        self._config = config
        self._device = device
        self._telemetry = telemetry
        self._ring = ring
        self._keys = Keys(config.redis.prefix, config.security.keep_s)
        self._slots = ModelSlots(config.slots)
        self._table = JobTable()
        self._changing = threading.Lock()
        self._session: Session | None = None
        self._drain: Drain | None = None

    def serve_models(self, names: Sequence[str]) -> Change:
        """Serve these models instead of those served now; callable from any thread but the consumer's, one at a time.

        Jobs that run are given back at the next sweep boundary, with their tokens and their attempt, and go on when the
        engines are open again, here or elsewhere. Shards must be at hand, for while they are built nothing is served.
        All or nothing: where the new models cannot be opened together, the old ones are served on. Names that are
        served already count as others; the first call that changes nothing returns at once. It lasts until the worker
        ends, and is not written into its settings.

        Returns:
            What is served now, and why it is not what was asked for: a name is not allowed, the models do not fit
            together, one cannot be opened, jobs could not be given back, the worker stops.
        """
        with self._changing:
            before = self._serving.names
            session = self._session
            if session is None or session.is_draining:
                return Change(before, "the worker does not run, or stops")
            try:
                models = admitted_models(self._config, names)
            except (ConfigError, ValidationError) as error:
                return self._refused(str(error))
            if tuple(model.name for model in models) == before:
                return Change(before, None)
            log.info("models change from %s to %s", ", ".join(before), ", ".join(names))
            with session.paused(self._config.worker.drain_s) as has_released:
                if not has_released:
                    return self._refused("jobs could not be given back in time, because Redis does not answer")
                try:
                    trouble = self._serving.change(models)
                except WorkerError as error:
                    return self._ended(str(error))
            return self._changed(trouble)

    def run(self) -> int:
        """Serve jobs until told to stop, then close everything; returns the exit code."""
        config = self._config
        for model in self._serving.names:
            facts = self._serving.facts(model)
            log.info("plan of %s: %d layers, %d bytes, %s", model, facts.num_layers, facts.size_bytes, facts.dtype)
            log.info("queue %s, %d slots, worker %s", queue_name(model), config.slots, self.name)
        with ExitStack() as stack:
            stack.callback(self._device.release)
            stack.callback(self._serving.close)
            client = open_redis(config.redis.url.get_secret_value(), REGISTRY_TIMEOUT_S)
            stack.callback(client.close)
            impatient = open_redis(config.redis.url.get_secret_value(), RECONCILER_TIMEOUT_S)
            stack.callback(impatient.close)
            telemetry = stack.enter_context(self._telemetry or Telemetry(config, self.name))
            watch = telemetry.watch
            registry = Registry(client, self._keys, self._ring)
            session = Session(self._serving, registry, self._table, config, self.name, watch, self._slots)
            drain = Drain(session, config.worker.drain_s)
            sources = self._tell_of(telemetry, session)
            heartbeat = Heartbeat(impatient, self._keys, self.name, sources.info)
            keeper = LeaseKeeper(self._table, session.delivery, config.worker.lease_s)
            calls = Registry(impatient, self._keys)
            reconciler = Reconciler(impatient, calls, self.name, config.worker.lease_s, watch)

            def on_publisher_failed(has_failed: bool) -> None:
                session.give_up()
                drain.request("the publisher failed", EXIT_FAILURE)

            drain.start()
            drain.install()
            stack.callback(drain.close, JOIN_S)
            stack.callback(self._serving.close)  # ends the publishers' iterators
            self._serving.publish(self._table, session.delivery, on_publisher_failed, watch)
            keeper.start()
            stack.callback(keeper.stop, JOIN_S)
            heartbeat.start()
            stack.callback(heartbeat.stop, JOIN_S)
            reconciler.start()
            stack.callback(reconciler.stop, JOIN_S)
            self._session, self._drain = session, drain
            pulls = PullKeeper(
                impatient, self._keys, self.name, config.engine, config.security.admitted_pull, self._land
            )
            pulls.start()
            stack.callback(pulls.stop, JOIN_S)
            return self._run_celery(session, sources)

    def _tell_of(self, telemetry: Telemetry, session: Session) -> EngineSources:
        facts = WorkerFacts(self.name, self._device.label, self._serving, self._table)
        facts.metrics_address = telemetry.metrics_address
        host = HostFacts(self._device, self._config.engine.store, self._ring)

        def info() -> WorkerInfo:
            return host.add_to(facts.info(is_draining=session.is_draining))

        sources = EngineSources(info, self._serving.counters, lambda model: self._serving.facts(model).plan)
        telemetry.tell_of(sources)
        return sources

    def _run_celery(self, session: Session, sources: EngineSources) -> int:
        subscriptions = Subscriptions(lambda: self._serving.names, self._config.slots)
        app = make_app(self._config, subscriptions, self._slots)
        app.lamella_sources = sources
        add_generate_task(app, session)
        signals.setup_logging.connect(_keep_logging)
        signals.worker_ready.connect(_spare_started)
        worker = LamellaWorker(
            app=app,
            hostname=f"{self.name}@{socket.gethostname()}",
            pool_cls=ThreadPool,
            consumer_cls=PatientConsumer,
            concurrency=app.conf.worker_concurrency,
            task_events=True,
            loglevel="INFO",
            quiet=True,
            without_gossip=True,
            without_mingle=True,
        )
        worker.start()
        session.give_up()  # Celery may stop by itself; then no task may go on waiting
        return int(worker.exitcode or 0)

    def _land(self, model: str) -> str:
        """Serve a model beside the others, now that its shards are here; returns what came of it."""
        before = self._serving.names
        if model in before:
            return "this worker serves it already"
        change = self.serve_models((*before, model))
        if change.trouble is not None:
            return f"but this worker cannot serve it beside {', '.join(before)}: {change.trouble}"
        return f"the worker serves {', '.join(change.models)} now"

    def _changed(self, trouble: str | None) -> Change:
        label_logs(ProcessLabels(self._config.telemetry.log_format, self.name, ",".join(self._serving.names)))
        log.info("models now: %s", ", ".join(self._serving.names))
        return Change(self._serving.names, trouble)

    def _refused(self, why: str) -> Change:
        log.error("the models stay as they are: %s", why)
        return Change(self._serving.names, why)

    def _ended(self, why: str) -> Change:
        """Not even the old engines open again: the worker gives its jobs back and ends."""
        if self._drain is not None:
            self._drain.request("no engine can be opened", EXIT_FAILURE)
        return Change((), why)


def _keep_logging(**_: Any) -> None:
    """Celery sets up no logging while this is connected."""


def _spare_started(**_: Any) -> None:
    """Celery calls this when its consumer has started."""
    spare_started()
