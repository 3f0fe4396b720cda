"""What the queue needs now and then: models tended, deadlines kept.

Owns a round over the models that have jobs: each is given what may be sent, and its jobs in flight are looked at; and
over the deadlines that have passed. All in bounded steps, by the reconciler's tick. Jobs are sent by the scripts that
submit and end them, so a round only mends what was missed: a worker that came or went, a limit that was raised.

Of jobs in flight it remembers when their leases end, and reads again only those that may end before the next tick: a
worker that lives has renewed them by then. What is left of them ends soon, and `due_in_s` says when.
"""

from __future__ import annotations

import time
from typing import NamedTuple, cast

import redis

from lamella.keys import Keys
from lamella.messages import JobState
from lamella.queue_calls import expire_call, tend_call
from lamella_worker.registry import Registry

TICK_S = 0.5
AHEAD_MS = 100  # leases that end so long after the next tick are read at this one already, for it may come late
EXPIRED_AT_ONCE = 100
EXPIRE_ROUNDS = 20  # so at most 2000 a tick, in steps short enough for a server that others wait for
MODELS_AT_ONCE = 100
LEASES_READ = 5000  # jobs in flight, of one model, in one round
LEASES_KNOWN = 4 * LEASES_READ  # remembered of one model, at most
LOOKED_AT = 500  # of those, jobs that no lease covers: sent and not claimed
LAPSED_AT_ONCE = 2000  # of those, jobs whose lease ran out


class _Lease(NamedTuple):
    """When a job came into flight, and when its lease ends; both in server milliseconds."""

    since_ms: float
    until_ms: int


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
        self._leases: dict[str, dict[str, _Lease]] = {}
        self._due_at = 0.0

    def due_in_s(self) -> float:
        """In how many seconds `tend` should be called again: a tick after the last call, or when a lease ends."""
        return max(0.0, self._due_at - time.monotonic())

    def tend(self) -> list[tuple[str, str]]:
        """Tend some models, and return (job id, model) of jobs in flight that are to be looked at."""
        self._due_at = time.monotonic() + TICK_S
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
        """Jobs in flight that nobody holds, however many others run."""
        first = self._offsets.pop(model, 0)
        asked_at = time.monotonic()
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.zrange(self._keys.flight(model), first, first + LEASES_READ - 1, withscores=True)
            (seconds, micros), page = cast(tuple[tuple[int, int], list[tuple[str, float]]], tuple(pipe.execute()))
        is_whole = first == 0 and len(page) < LEASES_READ
        if len(page) == LEASES_READ:
            self._offsets[model] = first + LEASES_READ
        now_ms = seconds * 1000 + micros // 1000
        held, free = self._read(model, page, now_ms)
        known = self._leases.get(model, {})
        self._leases[model] = held if is_whole or len(known) > LEASES_KNOWN else {**known, **held}
        if not self._leases[model]:
            del self._leases[model]
        ends_ms = min((lease.until_ms for lease in held.values()), default=now_ms + 1000 * TICK_S)
        self._due_at = min(self._due_at, asked_at + (ends_ms + 1 - now_ms) / 1000)
        return free

    def _read(self, model: str, page: list[tuple[str, float]], now_ms: int) -> tuple[dict[str, _Lease], list[str]]:
        """The leases that hold, and jobs without one: all whose lease ran out, and some of those not claimed."""
        soon_ms = now_ms + 1000 * TICK_S + AHEAD_MS
        known = self._leases.get(model, {})
        held: dict[str, _Lease] = {}
        asked: list[tuple[str, float]] = []
        for job_id, since_ms in page:
            lease = known.get(job_id)
            if lease is not None and lease.since_ms == since_ms and lease.until_ms > soon_ms:
                held[job_id] = lease
            else:
                asked.append((job_id, since_ms))
        with self._client.pipeline(transaction=False) as pipe:
            for job_id, _ in asked:
                pipe.hmget(self._keys.job(job_id), ["state", "lease_until"])
            records = cast(list[list[str | None]], pipe.execute())
        lapsed, unclaimed = [], []
        for (job_id, since_ms), (state, until) in zip(asked, records, strict=True):
            if state != JobState.RUNNING:
                unclaimed.append(job_id)
            elif not str(until).isdecimal() or int(str(until)) <= now_ms:
                lapsed.append(job_id)
            else:
                held[job_id] = _Lease(since_ms, int(str(until)))
        self._round += 1
        start = self._round * LOOKED_AT % len(unclaimed) if len(unclaimed) > LOOKED_AT else 0
        return held, lapsed[:LAPSED_AT_ONCE] + unclaimed[start : start + LOOKED_AT]
