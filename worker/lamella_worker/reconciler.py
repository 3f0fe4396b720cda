"""Finds jobs that nobody works on and sends their messages again; drops workers that are gone.

Owns one thread with its own clock: Celery's loop may sleep for a second, and waits for whatever its consumer does. One
worker at a time does it, the holder of the ``reconciler`` lock, whichever model it serves. It looks at the jobs in
flight, where messages and workers get lost, twice a second and at the very moment when a lease ends that nobody renews;
and once a second at a page of all active jobs, which finds those of versions without a queue of waiting jobs. What
counts as lost is decided by the nudge script, so two walkers at once do no harm. Without it a job whose message was
lost, or whose worker died, would wait for ever. `queue_tender` says what is in flight, and sends what was not sent in
time.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import cast

import redis
from redis.exceptions import RedisError

from lamella.keys import Keys
from lamella.registry_calls import NudgeStatus, nudge_call
from lamella_worker.job_watch import NO_WATCH, JobWatch
from lamella_worker.listing_sweep import ListingSweep
from lamella_worker.queue_tender import TICK_S, QueueTender
from lamella_worker.registry import Registry, RegistryAway, RegistryBroken
from lamella_worker.stoppable_thread import StoppableThread

log = logging.getLogger(__name__)

WALK_S = 1.0  # between two pages of all active jobs
PAGE = 500  # jobs looked at in one
WORKERS_LISTED = 1000
LOCK_MS = 1000  # of a leader that is gone; two at once do no harm
SHORTEST_WAIT_S = 0.005
SHORTEST_QUIET_MS = 2000


class Reconciler:
    """The walk and the thread that takes it; who calls `tick` by itself does not `start` it.

    Args:
        client: a connection with a short timeout, for what is asked may stall others.
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
        self._walked_at = float("-inf")
        self._is_away = False
        self._thread = StoppableThread("reconciler", self._run)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stop looking; waits at most `timeout_s` seconds for a look under way."""
        self._thread.stop(timeout_s)

    def _run(self, stop: threading.Event) -> None:
        wait_s = 0.0
        while not stop.wait(wait_s):
            try:
                wait_s = max(SHORTEST_WAIT_S, self.tick())
            except Exception:
                # A look that fails in an unforeseen way must not be the last one.
                log.exception("reconciling failed")
                wait_s = TICK_S

    def tick(self) -> float:
        """Look after what is due, if it is this worker's turn, and return in how many seconds to look again.

        A Redis that is away is left alone.
        """
        try:
            if not self._is_leader():
                return self._until_lock_ends_s()
            self._nudge(self._tender.tend())
            if time.monotonic() - self._walked_at >= WALK_S:
                self._walked_at = time.monotonic()
                self._nudge_page()
                self._drop_dead_workers()
                self._listing.sweep()
            self._is_away = False
            return self._tender.due_in_s()
        except (RedisError, RegistryAway, RegistryBroken) as error:
            if not self._is_away:
                log.warning("no reconciling for now: %s", error)
            self._is_away = True
        return TICK_S

    def _is_leader(self) -> bool:
        key = self._keys.reconciler
        if self._client.set(key, self._name, nx=True, px=LOCK_MS):
            return True
        if self._client.get(key) != self._name:
            return False
        return bool(self._client.pexpire(key, LOCK_MS))

    def _until_lock_ends_s(self) -> float:
        """When the lock ends if its holder does not renew it; a living one renews it several times before."""
        left_ms = self._client.pttl(self._keys.reconciler)
        return min(max(left_ms, 0) + 1, LOCK_MS) / 1000

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
