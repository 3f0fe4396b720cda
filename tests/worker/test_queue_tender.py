"""Many jobs in flight: those that nobody holds are found at once, the others are left alone."""

from __future__ import annotations

import redis

from lamella.keys import Keys
from lamella.messages import GenerateRequest, SamplingParams
from lamella.queue_calls import serve_call
from lamella.registry_calls import claim_call, release_call, submit_call
from lamella_worker.queue_tender import LOOKED_AT, TICK_S, QueueTender
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


def test_the_next_look_is_due_when_the_next_lease_ends(embedded_redis: redis.Redis) -> None:
    registry = claimed_jobs(embedded_redis, {"dying": 200, "living": 60_000})
    tender = QueueTender(embedded_redis, registry)

    found = tender.tend()
    due_in_s = tender.due_in_s()
    wait_until(lambda: tender.due_in_s() == 0)
    found_then = tender.tend()

    assert found == []
    assert due_in_s < 0.25
    assert found_then == [("dying", MODEL)]
    assert 0.3 < tender.due_in_s() <= TICK_S


def test_a_lease_that_holds_for_long_is_not_read_at_every_look(embedded_redis: redis.Redis) -> None:
    registry = claimed_jobs(embedded_redis, {f"job{number}": 60_000 for number in range(10)})
    tender = QueueTender(embedded_redis, registry)
    tender.tend()
    before = reads(embedded_redis)

    for _ in range(5):
        tender.tend()

    assert reads(embedded_redis) - before < 10


def test_a_job_that_came_back_is_read_again(embedded_redis: redis.Redis) -> None:
    registry = claimed_jobs(embedded_redis, {"job": 60_000})
    tender = QueueTender(embedded_redis, registry)
    tender.tend()

    registry.call(release_call(registry.keys, "job", 1, give_back_attempt=True))

    assert wait_until(tender.tend) == [("job", MODEL)]


def claimed_jobs(client: redis.Redis, leases_ms: dict[str, int]) -> Registry:
    """Jobs in flight with these leases, which nobody renews."""
    registry = Registry(client, Keys())
    registry.call(serve_call(registry.keys, "w", MODEL, len(leases_ms)))
    for job_id, lease_ms in leases_ms.items():
        registry.call(submit_call(registry.keys, job_id, GenerateRequest(model=MODEL, prompt="hello")))
        registry.call(claim_call(registry.keys, job_id, "w", lease_ms, 3))
    return registry


def reads(client: redis.Redis) -> int:
    """How often records were read."""
    return int(client.info("commandstats")["cmdstat_hmget"]["calls"])
