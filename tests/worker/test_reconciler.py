"""The reconciler: jobs that nobody works on get their message again, all others are left alone."""

from __future__ import annotations

import fakeredis
import pytest
import redis

from lamella.keys import Keys
from lamella.messages import GenerateRequest, JobState
from lamella.queue_calls import serve_call
from lamella.queue_terms import QueueTerms
from lamella.registry_calls import cancel_call, claim_call, release_call, submit_call
from lamella_worker import reconciler as reconciler_module
from lamella_worker.reconciler import LOCK_MS, Reconciler
from lamella_worker.registry import Registry
from tests.waiting import wait_until
from tests.worker.conftest import Jobs


@pytest.fixture
def reconciler(fake_redis: redis.Redis, registry: Registry) -> Reconciler:
    return Reconciler(fake_redis, registry, "w1", 1.0)


def age(client: redis.Redis, keys: Keys, job_id: str, **fields: int) -> None:
    """Set a job's times back, as if it had waited."""
    client.hset(keys.job(job_id), mapping=dict(fields))


def test_a_job_whose_message_was_lost_is_sent_again(
    reconciler: Reconciler, jobs: Jobs, fake_redis: redis.Redis, keys: Keys
) -> None:
    jobs.submit("a")
    fake_redis.delete(keys.queue_list("tiny"))
    age(fake_redis, keys, "a", nudged_at=1)

    reconciler.tick()

    assert jobs.queue() == ["a"]


def test_a_job_that_just_waits_is_not_sent_again(reconciler: Reconciler, jobs: Jobs) -> None:
    jobs.submit("a")

    reconciler.tick()

    assert jobs.queue() == ["a"]


def test_a_job_is_sent_again_as_soon_as_its_lease_ran_out(
    reconciler: Reconciler, jobs: Jobs, registry: Registry, fake_redis: redis.Redis, keys: Keys
) -> None:
    for job_id in ("held", "orphan"):
        jobs.submit(job_id)
        registry.call(claim_call(keys, job_id, "w9", 60_000, 3))
    fake_redis.delete(keys.queue_list("tiny"))
    age(fake_redis, keys, "orphan", lease_until=1)

    reconciler.tick()
    reconciler.tick()

    assert jobs.queue() == ["orphan"]


def test_jobs_of_every_model_are_sent_to_their_own_queues(
    reconciler: Reconciler, jobs: Jobs, fake_redis: redis.Redis, keys: Keys
) -> None:
    for model in ("tiny", "owner/big"):
        jobs.submit(f"job-{model}", model=model)
        fake_redis.delete(keys.queue_list(model))
        age(fake_redis, keys, f"job-{model}", nudged_at=1)

    reconciler.tick()

    assert jobs.queue("tiny") == ["job-tiny"]
    assert jobs.queue("owner/big") == ["job-owner/big"]


def test_a_released_job_is_not_sent_twice(
    reconciler: Reconciler, jobs: Jobs, registry: Registry, fake_redis: redis.Redis, keys: Keys
) -> None:
    jobs.submit("a")
    fence = registry.call(claim_call(keys, "a", "w9", 60_000, 3)).fence
    registry.call(release_call(keys, "a", fence, True))
    fake_redis.delete(keys.queue_list("tiny"))

    reconciler.tick()

    assert jobs.queue() == []


def test_jobs_whose_record_is_gone_leave_the_list(
    reconciler: Reconciler, jobs: Jobs, fake_redis: redis.Redis, keys: Keys
) -> None:
    jobs.submit("a")
    fake_redis.delete(keys.job("a"))

    reconciler.tick()

    assert fake_redis.zcard(keys.active) == 0


def test_a_long_list_is_walked_in_pages(
    reconciler: Reconciler, jobs: Jobs, fake_redis: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler_module, "PAGE", 3)
    names = [f"j{n}" for n in range(8)]
    for name in names:
        jobs.submit(name)
        age(fake_redis, keys, name, nudged_at=1)
    fake_redis.delete(keys.job("j1"))
    fake_redis.delete(keys.queue_list("tiny"))
    for name in names:
        age(fake_redis, keys, name, lease_until=1, nudges=0)
        if name != "j1":
            fake_redis.hset(keys.job(name), "state", "running")
    fake_redis.delete(keys.job("j1"))

    for _ in range(4):
        reconciler.tick()

    assert sorted(jobs.queue()) == sorted(name for name in names if name != "j1")


def test_one_worker_reconciles_at_a_time_and_another_takes_over(
    reconciler: Reconciler, jobs: Jobs, registry: Registry, fake_redis: redis.Redis, keys: Keys
) -> None:
    other = Reconciler(fake_redis, registry, "w2", 1.0)
    jobs.submit("a")
    age(fake_redis, keys, "a", nudged_at=1)
    reconciler.tick()
    fake_redis.delete(keys.queue_list("tiny"))
    age(fake_redis, keys, "a", nudged_at=1)

    other.tick()
    assert jobs.queue() == []
    fake_redis.delete(keys.reconciler)
    other.tick()

    assert jobs.queue() == ["a"]
    assert fake_redis.get(keys.reconciler) == "w2"


def test_workers_without_heartbeat_leave_the_list(reconciler: Reconciler, fake_redis: redis.Redis, keys: Keys) -> None:
    fake_redis.zadd(keys.workers, {"alive": 1, "dead": 2})
    fake_redis.set(keys.worker("alive"), "{}")

    reconciler.tick()

    assert fake_redis.zrange(keys.workers, 0, -1) == ["alive"]


def test_a_redis_that_is_away_is_reported_once_and_survived(
    reconciler: Reconciler,
    jobs: Jobs,
    fake_server: fakeredis.FakeServer,
    fake_redis: redis.Redis,
    keys: Keys,
    caplog: pytest.LogCaptureFixture,
) -> None:
    jobs.submit("a")
    age(fake_redis, keys, "a", nudged_at=1)
    fake_redis.delete(keys.queue_list("tiny"))
    fake_server.connected = False

    reconciler.tick()
    reconciler.tick()
    fake_server.connected = True
    reconciler.tick()

    assert sum("no reconciling" in record.message for record in caplog.records) == 1
    assert jobs.queue() == ["a"]


def test_jobs_past_their_deadline_are_ended_while_they_wait(
    reconciler: Reconciler, jobs: Jobs, registry: Registry, fake_redis: redis.Redis, keys: Keys
) -> None:
    request = GenerateRequest(model="tiny", prompt="hello")
    for number in range(150):
        registry.call(submit_call(keys, f"j{number}", request, QueueTerms(deadline_s=100.0)))
        fake_redis.zadd(keys.deadlines, {f"j{number}": 1})
    registry.call(submit_call(keys, "patient", request, QueueTerms(deadline_s=100.0)))

    reconciler.tick()

    assert fake_redis.zrange(keys.active, 0, -1) == ["patient"]
    assert jobs.state("j149") is JobState.FAILED


def test_what_was_not_sent_in_time_is_sent_by_a_tick(
    reconciler: Reconciler, jobs: Jobs, registry: Registry, fake_redis: redis.Redis, keys: Keys
) -> None:
    registry.call(submit_call(keys, "a", GenerateRequest(model="tiny", prompt="hello")))
    fake_redis.set(keys.capacity("tiny"), 1)

    reconciler.tick()

    assert jobs.queue() == ["a"]


def test_a_lost_job_in_flight_is_found_however_many_wait(
    reconciler: Reconciler, jobs: Jobs, registry: Registry, fake_redis: redis.Redis, keys: Keys
) -> None:
    for number in range(600):
        registry.call(submit_call(keys, f"j{number}", GenerateRequest(model="tiny", prompt="hello")))
    fake_redis.zadd(keys.active, {"j599": 2e12})
    registry.call(cancel_call(keys, "j0"))
    registry.call(claim_call(keys, "j599", "w9", 60_000, 3))
    age(fake_redis, keys, "j599", lease_until=1)

    reconciler.tick()

    assert jobs.queue() == ["j599"]


def test_the_reconcilers_own_thread_sends_a_job_again_once_its_lease_ended(embedded_redis: redis.Redis) -> None:
    registry = Registry(embedded_redis, Keys())
    registry.call(serve_call(registry.keys, "w", "tiny", 4))
    registry.call(submit_call(registry.keys, "a", GenerateRequest(model="tiny", prompt="hello")))
    embedded_redis.delete(registry.keys.queue_list("tiny"))
    registry.call(claim_call(registry.keys, "a", "gone", 700, 3))
    reconciler = Reconciler(embedded_redis, registry, "w1", 1.0)

    reconciler.start()
    try:
        wait_until(lambda: embedded_redis.llen(registry.keys.queue_list("tiny")) == 1)
    finally:
        reconciler.stop(10)

    nudged_at, lease_until = embedded_redis.hmget(registry.keys.job("a"), ["nudged_at", "lease_until"])
    assert int(str(nudged_at)) >= int(str(lease_until))


def test_who_does_not_lead_looks_again_when_the_leader_may_be_gone(
    reconciler: Reconciler, fake_redis: redis.Redis, registry: Registry
) -> None:
    reconciler.tick()
    other = Reconciler(fake_redis, registry, "w2", 1.0)

    wait_s = other.tick()

    assert 0 < wait_s <= LOCK_MS / 1000
