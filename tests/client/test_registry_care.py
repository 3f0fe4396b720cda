"""The scripts that look after jobs which were taken: release, nudge, cancel; on fakeredis."""

from __future__ import annotations

import json

import pytest
import redis

from lamella.messages import Cancelled, decode_event
from lamella.registry_calls import (
    CancelStatus,
    EmitStatus,
    NudgeStatus,
    ReleaseStatus,
    cancel_call,
    nudge_call,
    release_call,
)
from tests.client.acting_worker import MODEL, ActingWorker, call, done, token
from tests.client.registry_driver import KEYS, events, expire_lease, state, submit


@pytest.fixture
def worker(fake_redis: redis.Redis) -> ActingWorker:
    return ActingWorker(fake_redis)


class TestRelease:
    @pytest.mark.parametrize(("gives_back", "attempts"), [(True, "0"), (False, "1")])
    def test_the_job_waits_again(
        self, fake_redis: redis.Redis, worker: ActingWorker, gives_back: bool, attempts: str
    ) -> None:
        submit(fake_redis)
        fence = worker.claim("j1").fence
        worker.emit("j1", token("a"))

        reply = call(fake_redis, release_call(KEYS, "j1", fence, gives_back))

        assert reply is ReleaseStatus.OK
        assert state(fake_redis) == "queued"
        assert fake_redis.hget(KEYS.job("j1"), "attempts") == attempts
        assert worker.emit("j1", token("b")).status is EmitStatus.FENCED
        assert worker.claim("j1").seq == 1

    def test_only_the_holder_releases(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        fence = worker.claim("j1").fence

        assert call(fake_redis, release_call(KEYS, "j1", fence + 1, False)) is ReleaseStatus.FENCED
        assert call(fake_redis, release_call(KEYS, "other", fence, False)) is ReleaseStatus.MISSING

    def test_a_job_set_aside_is_offered_again_after_a_while(
        self, fake_redis: redis.Redis, worker: ActingWorker
    ) -> None:
        submit(fake_redis)
        fence = worker.claim("j1").fence
        fake_redis.delete(KEYS.queue_list(MODEL))

        call(fake_redis, release_call(KEYS, "j1", fence, True, True))

        assert state(fake_redis) == "queued"
        assert fake_redis.llen(KEYS.queue_list(MODEL)) == 0, "not at once: the same worker would take it again"
        assert fake_redis.zcard(KEYS.flight(MODEL)) == 0
        fake_redis.hset(KEYS.job("j1"), "nudged_at", 1)
        assert call(fake_redis, nudge_call(KEYS, "j1", MODEL, 10)) is NudgeStatus.NUDGED
        assert fake_redis.llen(KEYS.queue_list(MODEL)) == 1
        assert worker.claim("j1").attempts == 1


class TestNudge:
    def test_a_lost_message_is_sent_again(self, fake_redis: redis.Redis) -> None:
        submit(fake_redis)
        message = fake_redis.lpop(KEYS.queue_list(MODEL))

        reply = call(fake_redis, nudge_call(KEYS, "j1", MODEL, 0))

        assert reply is NudgeStatus.NUDGED
        (again,) = fake_redis.lrange(KEYS.queue_list(MODEL), 0, -1)
        assert json.loads(again)["body"] == json.loads(str(message))["body"]
        assert again != message, "each sending has a delivery tag of its own"

    def test_a_fresh_job_is_left_to_wait(self, fake_redis: redis.Redis) -> None:
        submit(fake_redis)

        assert call(fake_redis, nudge_call(KEYS, "j1", MODEL, 60_000)) is NudgeStatus.WAITING

    def test_a_held_job_is_left_alone(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")

        assert call(fake_redis, nudge_call(KEYS, "j1", MODEL, 0)) is NudgeStatus.HELD

    def test_an_expired_lease_is_nudged_at_once(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")
        expire_lease(fake_redis)

        assert call(fake_redis, nudge_call(KEYS, "j1", MODEL, 60_000)) is NudgeStatus.NUDGED
        assert call(fake_redis, nudge_call(KEYS, "j1", MODEL, 60_000)) is NudgeStatus.WAITING

    def test_an_ended_job_leaves_the_active_ones(self, fake_redis: redis.Redis) -> None:
        fake_redis.zadd(KEYS.active, {"ghost": 1})

        assert call(fake_redis, nudge_call(KEYS, "ghost", MODEL, 0)) is NudgeStatus.GONE
        assert fake_redis.zcard(KEYS.active) == 0


class TestCancel:
    def test_a_waiting_job_ends_at_once(self, fake_redis: redis.Redis) -> None:
        submit(fake_redis)

        assert call(fake_redis, cancel_call(KEYS, "j1")) is CancelStatus.CANCELLED
        assert events(fake_redis) == [("1-0", "cancelled")]
        assert decode_event(fake_redis.hget(KEYS.job("j1"), "outcome") or "") == Cancelled()

    def test_a_running_job_is_asked(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")

        assert call(fake_redis, cancel_call(KEYS, "j1")) is CancelStatus.REQUESTED
        assert worker.emit("j1", token("a")).cancel_requested

    def test_a_job_whose_worker_died_ends_at_once_and_fences_it(
        self, fake_redis: redis.Redis, worker: ActingWorker
    ) -> None:
        submit(fake_redis)
        worker.claim("j1")
        expire_lease(fake_redis)

        assert call(fake_redis, cancel_call(KEYS, "j1")) is CancelStatus.CANCELLED
        assert worker.emit("j1", token("a")).status is EmitStatus.FENCED

    def test_an_ended_job_stays_as_it_is(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")
        worker.emit("j1", done())

        assert call(fake_redis, cancel_call(KEYS, "j1")) is CancelStatus.DONE
        assert [kind for _, kind in events(fake_redis)] == ["done"]

    def test_a_missing_job_is_missing(self, fake_redis: redis.Redis) -> None:
        assert call(fake_redis, cancel_call(KEYS, "nobody")) is CancelStatus.MISSING
