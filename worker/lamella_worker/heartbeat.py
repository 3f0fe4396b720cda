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
from lamella_engine.sequence_types import EngineCounters, EngineFacts
from lamella_worker.job_table import JobTable
from lamella_worker.registry import Registry, RegistryAway, RegistryBroken
from lamella_worker.scripts import load_scripts
from lamella_worker.stoppable_thread import StoppableThread

log = logging.getLogger(__name__)


class WorkerFacts:
    """Makes WorkerInfo from the engine's figures and the jobs at hand.

    Args:
        name: the worker's name.
        model: the name it serves the model under.
        device: what it runs on, in words.
        facts: asks for the open engine's facts.
        counters: asks the engine for its totals.
        table: the running jobs.
        child: asks for the state of the engine's process; None where it has none of its own.

    Attributes:
        name: the worker's name.
        metrics_address: where it serves metrics, set before it is asked; None for nowhere.
    """

    def __init__(
        self,
        name: str,
        model: str,
        device: str,
        facts: Callable[[], EngineFacts],
        counters: Callable[[], EngineCounters],
        table: JobTable,
        child: Callable[[], EngineProcessInfo] | None = None,
    ) -> None:
        self.name = name
        self._device = device
        self._facts = facts
        self._counters = counters
        self._table = table
        self._started_at = time.time()
        self._model_name = model
        self._child = child
        self.metrics_address: str | None = None

    def info(self, *, is_draining: bool) -> WorkerInfo:
        """Return how the worker stands now.

        `last_sweep_at` counts from when the worker last became busy, so that a worker whose first sweep after a
        quiet hour is under way does not look stuck.
        """
        counters, facts = self._counters(), self._facts()
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
            model=ModelInfo(
                name=self._model_name,
                family=facts.family,
                dtype=facts.dtype,
                num_layers=facts.num_layers,
                context_length=facts.context_length,
                size_bytes=facts.size_bytes,
            ),
            slots=counters.batch_limit or facts.max_sequences,
            running=len(self._table.jobs()),
            draining=is_draining,
            started_at=self._started_at,
            heartbeat_at=time.time(),
            last_sweep_at=last_sweep_at,
            sweeps=counters.sweeps,
            tokens=counters.tokens,
            streamed_bytes=counters.streamed_bytes,
            peak_rss_bytes=counters.peak_rss_bytes,
            engine_process=self._child() if self._child is not None else None,
            metrics_address=self.metrics_address,
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
        self._model: str | None = None  # the one whose queue was told of our slots

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
        self._model = info.model.name
        slots = 0 if info.draining else info.slots
        self._registry.call(serve_call(self._keys, self._name, self._model, slots))

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
            if self._model is not None:
                self._registry.call(serve_call(self._keys, self._name, self._model, 0))
        except (RedisError, RegistryAway, RegistryBroken) as error:
            log.info("the heartbeat is left to expire: %s", error)
