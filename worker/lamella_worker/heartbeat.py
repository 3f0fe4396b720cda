"""Tells everybody that this worker lives, and how it fares.

Owns the worker's WorkerInfo in Redis: written every HEARTBEAT_S with a time to live, removed at exit. Clients list it,
the health check and the reconciler read it. With it the queue learns how many slots there are, so that it sends as many
jobs, and one more; a job's fate hangs on its lease alone.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from importlib.metadata import version

import redis
from redis.exceptions import RedisError

from lamella.keys import HEARTBEAT_S, WORKER_TTL_S, Keys
from lamella.messages import EngineProcessInfo, ModelInfo, WorkerInfo
from lamella.queue_calls import serve_call
from lamella_worker.engine_port import ChildState
from lamella_worker.job_table import JobTable
from lamella_worker.registry import Registry, RegistryAway, RegistryBroken
from lamella_worker.scripts import load_scripts
from lamella_worker.serving import Serving
from lamella_worker.stoppable_thread import StoppableThread

log = logging.getLogger(__name__)


class WorkerFacts:
    """Makes WorkerInfo from the engines' figures and the jobs at hand.

    Args:
        name: the worker's name.
        device: what it runs on, in words.
        serving: what it serves.
        table: the running jobs.

    Attributes:
        name: the worker's name.
        metrics_address: where it serves metrics, set before it is asked; None for nowhere.
    """

    def __init__(
        self,
        name: str,
        device: str,
        serving: Serving,
        table: JobTable,
    ) -> None:
        self.name = name
        self._device = device
        self._serving = serving
        self._table = table
        self._started_at = time.time()
        self.metrics_address: str | None = None

    def info(self, *, is_draining: bool) -> WorkerInfo:
        """Return how the worker stands now.

        `last_sweep_at` counts from when the worker last became busy, so that a worker whose first sweep after a
        quiet hour is under way does not look stuck.
        """
        counters, state = self._serving.all_counters(), self._serving.state
        models = tuple(self._model(name) for name in self._serving.names)
        busy_since = self._table.busy_since
        last_sweep_at = counters.last_sweep_at
        if busy_since is not None:
            last_sweep_at = max(busy_since, last_sweep_at or 0.0)
        return WorkerInfo(
            name=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=version("lamella"),
            device=self._device,
            model=models[0],
            models=models,
            slots=sum(model.slots for model in models),
            running=len(self._table.jobs()),
            draining=is_draining,
            started_at=self._started_at,
            heartbeat_at=time.time(),
            last_sweep_at=last_sweep_at,
            sweeps=counters.sweeps,
            tokens=counters.tokens,
            streamed_bytes=counters.streamed_bytes,
            peak_rss_bytes=counters.peak_rss_bytes,
            engine_process=None if state is None else _process_info(state),
            metrics_address=self.metrics_address,
            tier_bytes=(counters.disk_bytes, counters.ram_bytes, counters.vram_bytes),
        )

    def _model(self, name: str) -> ModelInfo:
        facts, counters = self._serving.facts(name), self._serving.counters(name)
        return ModelInfo(
            name=name,
            family=facts.family,
            dtype=facts.dtype,
            num_layers=facts.num_layers,
            context_length=facts.context_length,
            size_bytes=facts.size_bytes,
            slots=counters.batch_limit or facts.max_sequences,
            running=sum(job.model == name for job in self._table.jobs()),
        )


def _process_info(state: ChildState) -> EngineProcessInfo:
    return EngineProcessInfo(
        pid=state.pid,
        state="failed" if state.has_failed else "ready" if state.is_ready else "starting",
        restarts=state.restarts,
        max_sequences=state.max_sequences,
        trouble=state.trouble,
    )


class Heartbeat:
    """A thread that writes WorkerInfo until it is stopped."""

    def __init__(self, client: redis.Redis, keys: Keys, name: str, info: Callable[[], WorkerInfo]) -> None:
        self._client = client
        self._keys = keys
        self._registry = Registry(client, keys)
        self._name = name
        self._info = info
        self._thread = StoppableThread("heartbeat", self._run)
        self._is_away = False
        self._told: tuple[str, ...] = ()  # the models whose queues were told of our slots

    def start(self) -> None:
        """Write the first heartbeat now, and then one every HEARTBEAT_S."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stop, and take the worker off the list; waits at most `timeout_s` seconds."""
        self._thread.stop(timeout_s)

    def beat(self) -> None:
        """Write one heartbeat.

        Raises:
            RedisError, RegistryAway, RegistryBroken: Redis did not take it.
        """
        info = self._info()
        with self._client.pipeline(transaction=True) as pipe:
            pipe.set(self._keys.worker(self._name), info.model_dump_json(), ex=WORKER_TTL_S)
            pipe.zadd(self._keys.workers, {self._name: int(info.heartbeat_at * 1000)})
            pipe.execute()
        load_scripts(self._client)  # a server that was started anew has forgotten them, and clients may not load them
        slots = {model.name: 0 if info.draining else model.slots for model in info.served}
        told, self._told = self._told, tuple(slots)
        for model in (*slots, *(model for model in told if model not in slots)):
            self._registry.call(serve_call(self._keys, self._name, model, slots.get(model, 0)))

    def _run(self, stop: threading.Event) -> None:
        is_first = True
        while is_first or not stop.wait(HEARTBEAT_S):
            is_first = False
            try:
                self.beat()
                self._is_away = False
            except (RedisError, RegistryAway, RegistryBroken) as error:
                if not self._is_away:
                    log.warning("the heartbeat cannot be written: %s", error)
                self._is_away = True
        self._sign_off()

    def _sign_off(self) -> None:
        try:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.delete(self._keys.worker(self._name))
                pipe.zrem(self._keys.workers, self._name)
                pipe.execute()
            for model in self._told:
                self._registry.call(serve_call(self._keys, self._name, model, 0))
        except (RedisError, RegistryAway, RegistryBroken) as error:
            log.info("the heartbeat is left to expire: %s", error)
