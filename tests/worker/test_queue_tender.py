"""Many jobs in flight: those that nobody holds are found at once, the others are left alone."""

from __future__ import annotations

import redis

from lamella.keys import Keys
from lamella.messages import GenerateRequest, SamplingParams
from lamella.queue_calls import serve_call
from lamella.registry_calls import claim_call, submit_call
from lamella_worker.queue_tender import LOOKED_AT, QueueTender
from lamella_worker.registry import Registry
from tests.waiting import wait_until

MODEL = "tiny"
MANY = LOOKED_AT + 60


def test_a_lapsed_lease_is_found_among_many_that_hold(
    embedded_redis: redis.Redis,
) -> None:
    registry = Registry(embedded_redis, Keys())
    request = GenerateRequest(model=MODEL, prompt="hello", sampling=SamplingParams(max_tokens=5))
    registry.call(serve_call(registry.keys, "w", MODEL, MANY))
    ids = [f"job{number}" for number in range(MANY)]
    registry.call_many([submit_call(registry.keys, each, request) for each in ids])
    unclaimed, lost, held = ids[:20], ids[300:310], [*ids[20:300], *ids[310:]]
    registry.call_many([claim_call(registry.keys, each, "w", 600_000, 3) for each in held])
    registry.call_many([claim_call(registry.keys, each, "gone", 1, 3) for each in lost])
    tender = QueueTender(embedded_redis, registry)

    found = wait_until(lambda: {each for each, _ in tender.tend()} >= set(lost) and tender.tend())

    assert found
    assert {each for each, _ in found} == {*lost, *unclaimed}
