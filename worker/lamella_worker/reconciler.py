"""Finds jobs that nobody works on and sends their messages again; drops workers that are gone.

Owns two walks in bounded pages, about once a second, by one worker at a time (the holder of the ``reconciler`` lock,
whichever model it serves): over the jobs in flight, where messages and workers get lost, and slowly over all active
jobs, which finds those of versions without a queue of waiting jobs. What counts as lost is decided by the nudge script,
so two walkers at once do no harm. Without it a job whose message was lost, or whose worker died, would wait for ever.
`queue_tender` says what is in flight, and sends what was not sent in time.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import redis
from celery import bootsteps
from redis.exceptions import RedisError

from lamella.keys import Keys
from lamella.registry_calls import NudgeStatus, nudge_call
from lamella_worker.job_watch import NO_WATCH, JobWatch
from lamella_worker.listing_sweep import ListingSweep
from lamella_worker.queue_tender import QueueTender
from lamella_worker.registry import Registry, RegistryAway, RegistryBroken

log = logging.getLogger(__name__)

TICK_S = 0.5  # asked of Celery's loop, which wakes once a second when nothing happens
PAGE = 500  # jobs looked at in one tick
WORKERS_LISTED = 1000
LOCK_MS = 2000  # of a leader that is gone; two at once do no harm
SHORTEST_QUIET_MS = 2000


class Reconciler:
    """The walk itself; `tick` is called by one thread.

    Args:
        client: a connection with a short timeout, since `tick` runs on the consumer's loop.
        registry: where nudges go; over the same client.
        name: this worker, as it holds the lock.
        lease_s: the least time between two nudges of a job.
        watch: is told of nudges.
    """

    def __init__(
        self, client: redis.Redis, registry: Registry, name: str, lease_s: float, watch: JobWatch = NO_WATCH
    ) -> None:
        self._client = client
        self._registry = registry
        self._keys: Keys = registry.keys
        self._name = name
        self._tender = QueueTender(client, registry)
        self._quiet_ms = max(SHORTEST_QUIET_MS, int(lease_s * 1000))
        self._watch = watch
        self._offset = 0
        self._listing = ListingSweep(client, registry.keys)
        self._is_away = False

    def tick(self) -> None:
        """Look at the next page of active jobs, if it is this worker's turn; a Redis that is away is left alone."""
        try:
            if not self._is_leader():
                return
            self._nudge(self._tender.tend())
            self._nudge_page()
            self._drop_dead_workers()
            self._listing.sweep()
            self._is_away = False
        except (RedisError, RegistryAway, RegistryBroken) as error:
            if not self._is_away:
                log.warning("no reconciling for now: %s", error)
            self._is_away = True

    def _is_leader(self) -> bool:
        key = self._keys.reconciler
        if self._client.set(key, self._name, nx=True, px=LOCK_MS):
            return True
        if self._client.get(key) != self._name:
            return False
        return bool(self._client.pexpire(key, LOCK_MS))

    def _nudge_page(self) -> None:
        page = cast(list[str], self._client.zrange(self._keys.active, self._offset, self._offset + PAGE - 1))
        if not page:
            self._offset = 0
            return
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in page:
                pipe.hget(self._keys.job(job_id), "model")
            models = cast(list[str | None], pipe.execute())
        num_gone = self._nudge([(job_id, model or "none") for job_id, model in zip(page, models, strict=True)])
        is_last_page = len(page) < PAGE
        self._offset = 0 if is_last_page else self._offset + len(page) - num_gone

    def _nudge(self, jobs: list[tuple[str, str]]) -> int:
        """Look at jobs, given with their models, and return how many are gone."""
        calls = [nudge_call(self._keys, job_id, model, self._quiet_ms) for job_id, model in jobs]
        num_gone = 0
        for (job_id, _), answer in zip(jobs, self._registry.call_many(calls), strict=True):
            if isinstance(answer, RegistryBroken):  # one record that no worker can have written must not stop the walk
                log.error("job=%s cannot be looked after, its record is malformed: %s", job_id, answer)
                continue
            if isinstance(answer, Exception):
                raise answer
            if answer is NudgeStatus.NUDGED:
                self._watch.nudged(1)
                log.warning("job=%s its message is sent again", job_id)
            num_gone += answer is NudgeStatus.GONE
        return num_gone

    def _drop_dead_workers(self) -> None:
        names = cast(list[str], self._client.zrange(self._keys.workers, 0, WORKERS_LISTED - 1))
        if not names:
            return
        beats = cast(list[str | None], self._client.mget([self._keys.worker(name) for name in names]))
        dead = [name for name, beat in zip(names, beats, strict=True) if beat is None]
        if dead:
            self._client.zrem(self._keys.workers, *dead)
            log.warning("workers that are gone: %s", ", ".join(dead))


class ReconcilerStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery publishes no types
    """Ticks the app's reconciler from the consumer's loop; the app carries it as `lamella_reconciler`."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Start the timer; called again after each reconnect."""
        self._timer = consumer.timer.call_repeatedly(TICK_S, consumer.app.lamella_reconciler.tick)

    def stop(self, consumer: Any) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
