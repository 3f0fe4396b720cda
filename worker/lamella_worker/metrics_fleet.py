"""Metrics of all workers together: jobs that wait and since when, workers and slots, jobs that died.

Owns their names and meaning, and how often Redis is asked. They come from one place of their own, not from a worker: a
queue matters most when no worker lives. `metrics_cli` serves them; a job's record says whether it waits, so how waiting
jobs are kept in queues is nothing to this module.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import redis
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from lamella.keys import JOBS_LISTED, Keys
from lamella.messages import WorkerInfo
from lamella.records import decode_workers
from lamella.registry_calls import ATTEMPTS_EXHAUSTED

log = logging.getLogger(__name__)

PAGE = 1000
JOBS_COUNTED = 200_000  # active jobs looked at; of more, the oldest
WORKERS_LISTED = 1000
MODELS_SHOWN = 100  # those with most jobs and workers; a client may name any model, so the others share one label
OTHER = "other"
KEEP_S = 5.0  # seconds that an answer of Redis is good for, however often one scrapes


@dataclass
class Fleet:
    """What Redis told at one moment; every counter is by model."""

    queued: Counter[str] = field(default_factory=Counter)
    running: Counter[str] = field(default_factory=Counter)
    dead: Counter[str] = field(default_factory=Counter)
    oldest_ms: dict[str, int] = field(default_factory=dict)  # acceptance of the job that has waited longest
    workers: tuple[WorkerInfo, ...] = ()
    now_ms: int = 0


class FleetReader:
    """Reads the registry; safe to use from several threads, one asks at a time."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._lock = threading.Lock()
        self._kept: Fleet | None = None
        self._is_away = False
        self._read_at = float("-inf")

    def read(self) -> Fleet | None:
        """What Redis tells, at most KEEP_S old; None if it does not answer."""
        with self._lock:
            if time.monotonic() - self._read_at >= KEEP_S:
                try:
                    self._kept = self._read()
                    self._is_away = False
                except RedisError as error:
                    if not self._is_away:
                        log.warning("Redis does not answer: %s", error)
                    self._kept, self._is_away = None, True
                self._read_at = time.monotonic()
            return self._kept

    def _read(self) -> Fleet:
        seconds, micros = self._client.time()
        fleet = Fleet(now_ms=int(seconds) * 1000 + int(micros) // 1000)
        for first in range(0, JOBS_COUNTED, PAGE):
            ids = cast(list[str], self._client.zrange(self._keys.active, first, first + PAGE - 1))
            for state, model, created_at in self._records(ids, "state", "model", "created_at"):
                if state is None or model is None or created_at is None:
                    continue  # it has gone since
                if state == "running":
                    fleet.running[model] += 1
                else:
                    fleet.queued[model] += 1
                    fleet.oldest_ms[model] = min(int(created_at), fleet.oldest_ms.get(model, fleet.now_ms))
            if len(ids) < PAGE:
                break
        self._count_dead(fleet)
        names = cast(list[str], self._client.zrange(self._keys.workers, 0, WORKERS_LISTED - 1))
        if names:
            beats = cast(list[str | None], self._client.mget([self._keys.worker(name) for name in names]))
            fleet.workers = tuple(decode_workers(beats))
        return fleet

    def _count_dead(self, fleet: Fleet) -> None:
        ids = cast(list[str], self._client.zrange(self._keys.jobs, 0, JOBS_LISTED - 1))
        for first in range(0, len(ids), PAGE):
            page = ids[first : first + PAGE]
            for state, model, outcome, retried_as in self._records(page, "state", "model", "outcome", "retried_as"):
                is_dead = state == "failed" and f'"{ATTEMPTS_EXHAUSTED}"' in (outcome or "")
                if model is not None and is_dead and retried_as is None:
                    fleet.dead[model] += 1

    def _records(self, ids: Sequence[str], *fields: str) -> list[list[str | None]]:
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hmget(self._keys.job(job_id), list(fields))
            return cast(list[list[str | None]], pipe.execute())


class FleetCollector(Collector):
    """Turns what a reader reads into metrics."""

    def __init__(self, read: Callable[[], Fleet | None]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Ask once; where Redis does not answer, that is all there is to tell."""
        fleet = self._read()
        up = GaugeMetricFamily("lamella_redis_up", "1 while Redis answers.")
        up.add_metric([], fleet is not None)
        yield up
        if fleet is not None:
            yield from _metrics(fleet)


def _metrics(fleet: Fleet) -> Iterable[Metric]:
    workers, slots, busy = Counter[str](), Counter[str](), Counter[str]()
    for info, model in ((worker, model) for worker in fleet.workers for model in worker.served):
        workers[model.name] += not info.draining
        slots[model.name] += 0 if info.draining else model.slots
        busy[model.name] += model.running
    weight = fleet.queued + fleet.running + fleet.dead + Counter(dict.fromkeys(workers, 1))
    shown = [model for model, _ in weight.most_common(MODELS_SHOWN)]
    ages = Counter({model: max(0, fleet.now_ms - at) / 1000 for model, at in fleet.oldest_ms.items()})

    def gauge(name: str, meaning: str, values: Counter[str], together: Callable[[Iterable[float]], float]) -> Metric:
        family = GaugeMetricFamily(f"lamella_{name}", meaning, labels=["model"])
        for model in shown:
            family.add_metric([model], values[model])
        if others := [values[model] for model in weight if model not in shown]:
            family.add_metric([OTHER], together(others))
        return family

    yield gauge("queue_jobs", "Jobs that wait for a worker.", fleet.queued, sum)
    yield gauge("queue_age_seconds", "How long the oldest job that waits has existed.", ages, max)
    yield gauge("active_jobs", "Jobs that a worker has claimed and not ended.", fleet.running, sum)
    yield gauge("retriable_dead_jobs", "Of the newest 1000, jobs whose attempts are used up.", fleet.dead, sum)
    yield gauge("workers", "Live workers that take jobs.", workers, sum)
    yield gauge("worker_slots", "Jobs that these workers run at once.", slots, sum)
    yield gauge("busy_slots", "Jobs that live workers hold.", busy, sum)


def targets(fleet: Fleet | None) -> list[dict[str, object]]:
    """The workers that serve metrics, in the form of Prometheus's HTTP service discovery."""
    infos = () if fleet is None else fleet.workers
    return [
        {"targets": [info.metrics_address], "labels": {"lamella_worker": info.name}}
        for info in infos
        if info.metrics_address is not None
    ]
