"""What the queue needs now and then: models tended, deadlines kept.

Owns a round over the models that have jobs: each is given what may be sent, and its jobs in flight are looked at; and
over the deadlines that have passed. All in bounded steps, by the reconciler's tick. Jobs are sent by the scripts that
submit and end them, so a round only mends what was missed: a worker that came or went, a limit that was raised.
"""

from __future__ import annotations

from typing import cast

import redis

from lamella.keys import Keys
from lamella.messages import JobState
from lamella.queue_calls import expire_call, tend_call
from lamella_worker.registry import Registry

EXPIRED_AT_ONCE = 100
EXPIRE_ROUNDS = 20  # so at most 2000 a tick, in steps short enough for a server that others wait for
MODELS_AT_ONCE = 100
LEASES_READ = 5000  # of jobs in flight, of one model, in one round
LOOKED_AT = 500  # of those, jobs that no lease covers: sent and not claimed
LAPSED_AT_ONCE = 2000  # of those, jobs whose lease ran out


class QueueTender:
    """Tends the queues of all models; raises RegistryAway, RegistryBroken or RedisError if Redis does not do its part.

    Args:
        client: for the listings.
        registry: where the scripts go; over the same client.
    """

    def __init__(self, client: redis.Redis, registry: Registry) -> None:
        self._client = client
        self._registry = registry
        self._keys: Keys = registry.keys
        self._cursor = 0
        self._offsets: dict[str, int] = {}
        self._round = 0

    def tend(self) -> list[tuple[str, str]]:
        """Tend some models, and return (job id, model) of jobs in flight that are to be looked at."""
        self._expire()
        found = cast(
            tuple[int, list[str]], self._client.sscan(self._keys.queues, cursor=self._cursor, count=MODELS_AT_ONCE)
        )
        self._cursor, models = found
        in_flight: list[tuple[str, str]] = []
        for model in models:
            self._registry.call(tend_call(self._keys, model))
            in_flight.extend((job_id, model) for job_id in self._page(model))
        return in_flight

    def _expire(self) -> None:
        for _ in range(EXPIRE_ROUNDS):
            if self._registry.call(expire_call(self._keys, EXPIRED_AT_ONCE)) < EXPIRED_AT_ONCE:
                return

    def _page(self, model: str) -> list[str]:
        first = self._offsets.pop(model, 0)
        page = cast(list[str], self._client.zrange(self._keys.flight(model), first, first + LEASES_READ - 1))
        if len(page) == LEASES_READ:
            self._offsets[model] = first + LEASES_READ
        return page if len(page) <= LOOKED_AT else self._without_lease(page)

    def _without_lease(self, page: list[str]) -> list[str]:
        """Those of many jobs that nobody holds: reading a lease costs a quarter of the script that looks at a job.

        So jobs of a lost worker are found a second after their leases ran out, however many others run.
        """
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            for job_id in page:
                pipe.hmget(self._keys.job(job_id), ["state", "lease_until"])
            (seconds, micros), *records = cast(tuple[tuple[int, int], list[str | None]], tuple(pipe.execute()))
        now_ms = seconds * 1000 + micros // 1000
        lapsed, unclaimed = [], []
        for job_id, record in zip(page, records, strict=True):
            state, lease_until = record
            if state != JobState.RUNNING:
                unclaimed.append(job_id)
            elif not str(lease_until).isdecimal() or int(str(lease_until)) <= now_ms:
                lapsed.append(job_id)
        self._round += 1
        start = self._round * LOOKED_AT % max(len(unclaimed), 1)
        return lapsed[:LAPSED_AT_ONCE] + unclaimed[start : start + LOOKED_AT]
