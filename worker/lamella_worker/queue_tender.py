"""What the queue needs now and then: models tended, deadlines kept.

Owns a round over the models that have jobs: each is given what may be sent, and its jobs in flight are looked at; and
over the deadlines that have passed. All in bounded steps, by the reconciler's tick. Jobs are sent by the scripts that
submit and end them, so a round only mends what was missed: a worker that came or went, a limit that was raised.
"""

from __future__ import annotations

from typing import cast

import redis

from lamella.keys import Keys
from lamella.queue_calls import expire_call, tend_call
from lamella_worker.registry import Registry

EXPIRED_AT_ONCE = 100
EXPIRE_ROUNDS = 20  # so at most 2000 a tick, in steps short enough for a server that others wait for
MODELS_AT_ONCE = 100
LOOKED_AT = 500  # jobs in flight, of one model, in one round


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
        page = cast(list[str], self._client.zrange(self._keys.flight(model), first, first + LOOKED_AT - 1))
        if len(page) == LOOKED_AT:
            self._offsets[model] = first + LOOKED_AT
        return page
