"""Every script, in every state of a job, on fakeredis."""

from __future__ import annotations

import time

import pytest
import redis

from lamella import keys as wire_keys
from lamella.errors import DecodeError
from lamella.messages import Failed, decode_event, decode_request
from lamella.records import STATUS_FIELDS, decode_status
from lamella.registry_calls import (
    ClaimStatus,
    EmitStatus,
    Idempotency,
    SubmitStatus,
    cancel_call,
    emit_call,
    release_call,
)
from tests.client.acting_worker import MODEL, ActingWorker, call, done, failed, token
from tests.client.registry_driver import KEYS, events, expire_lease, state, submit


@pytest.fixture
def worker(fake_redis: redis.Redis) -> ActingWorker:
    return ActingWorker(fake_redis)


class TestSubmit:
    def test_creates_record_listing_and_message_together(self, fake_redis: redis.Redis) -> None:
        reply = submit(fake_redis)

        assert reply[:3] == (SubmitStatus.CREATED, "j1", 1)
        assert state(fake_redis) == "queued"
        assert fake_redis.zrange(KEYS.active, 0, -1) == ["j1"]
        assert fake_redis.zrange(KEYS.jobs, 0, -1) == ["j1"]
        assert fake_redis.llen(KEYS.queue_list(MODEL)) == 1

    def test_repeating_the_same_id_is_recognised(self, fake_redis: redis.Redis) -> None:
        submit(fake_redis)

        reply = submit(fake_redis)

        assert reply.status is SubmitStatus.DUPLICATE
        assert fake_redis.llen(KEYS.queue_list(MODEL)) == 1

    def test_same_key_and_hash_returns_the_first_job(self, fake_redis: redis.Redis) -> None:
        submit(fake_redis, "j1", idempotency=Idempotency("k", "h"))

        reply = submit(fake_redis, "j2", idempotency=Idempotency("k", "h"))

        assert reply[:2] == (SubmitStatus.EXISTS, "j1")
        assert state(fake_redis, "j2") is None

    def test_same_key_with_another_hash_conflicts(self, fake_redis: redis.Redis) -> None:
        submit(fake_redis, "j1", idempotency=Idempotency("k", "h"))

        reply = submit(fake_redis, "j2", idempotency=Idempotency("k", "other"))

        assert reply[:2] == (SubmitStatus.CONFLICT, "j1")

    def test_idempotency_keys_expire(self, fake_redis: redis.Redis) -> None:
        submit(fake_redis, idempotency=Idempotency("k", "h"))

        assert 0 < fake_redis.ttl(KEYS.idempotency("k")) <= wire_keys.IDEMPOTENCY_TTL_S

    def test_a_full_queue_stores_nothing(self, fake_redis: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wire_keys, "MAX_QUEUED", 1)
        submit(fake_redis, "j1", slots=0)

        reply = submit(fake_redis, "j2", idempotency=Idempotency("k", "h"), slots=0)

        assert reply.status is SubmitStatus.FULL
        assert reply.limit == 1
        assert reply.retry_after_s > 0
        assert state(fake_redis, "j2") is None
        assert not fake_redis.exists(KEYS.idempotency("k"))

    def test_the_listing_is_bounded(self, fake_redis: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wire_keys, "JOBS_LISTED", 2)

        for number in range(4):
            submit(fake_redis, f"j{number}")

        assert fake_redis.zcard(KEYS.jobs) == 2
        assert fake_redis.zcard(KEYS.active) == 4


class TestClaim:
    def test_takes_a_queued_job_with_fence_and_request(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)

        reply = worker.claim("j1")

        assert reply[:4] == (ClaimStatus.OK, 1, 1, 0)
        assert decode_request(reply.request_json).prompt == "hello"
        assert state(fake_redis) == "running"

    def test_a_missing_job_is_missing(self, worker: ActingWorker) -> None:
        assert worker.claim("nobody").status is ClaimStatus.MISSING

    def test_a_leased_job_is_held(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")

        assert ActingWorker(fake_redis, "other").claim("j1").status is ClaimStatus.HELD

    def test_after_the_lease_the_fence_rises_and_the_stream_goes_on(
        self, fake_redis: redis.Redis, worker: ActingWorker
    ) -> None:
        submit(fake_redis)
        worker.claim("j1")
        worker.emit("j1", token("a"), token("b"))
        expire_lease(fake_redis)

        reply = ActingWorker(fake_redis, "other").claim("j1")

        assert reply[:4] == (ClaimStatus.OK, 2, 2, 2)

    def test_it_says_whether_the_worker_before_was_lost_or_gave_it_back(
        self, fake_redis: redis.Redis, worker: ActingWorker
    ) -> None:
        submit(fake_redis)
        first = worker.claim("j1")
        call(fake_redis, release_call(KEYS, "j1", first.fence, False))
        given_back = worker.claim("j1")
        expire_lease(fake_redis)

        assert [first.was_left, given_back.was_left, worker.claim("j1").was_left] == [False, False, True]

    def test_a_stale_worker_is_refused(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")
        expire_lease(fake_redis)
        ActingWorker(fake_redis, "other").claim("j1")

        assert worker.emit("j1", token("a")).status is EmitStatus.FENCED
        assert events(fake_redis) == []

    def test_out_of_attempts_ends_the_job_in_failed(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        for _ in range(2):
            assert worker.claim("j1", max_attempts=2).status is ClaimStatus.OK
            expire_lease(fake_redis)

        reply = worker.claim("j1", max_attempts=2)

        assert reply.status is ClaimStatus.POISON
        outcome = decode_event(fake_redis.hget(KEYS.job("j1"), "outcome") or "")
        assert isinstance(outcome, Failed)
        assert outcome.code == "attempts_exhausted"
        assert "2 times" in outcome.message
        assert events(fake_redis) == [("1-0", "failed")]
        assert fake_redis.zcard(KEYS.active) == 0
        assert worker.claim("j1").status is ClaimStatus.FAILED

    def test_an_unknown_schema_is_left_alone(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        fake_redis.hset(KEYS.job("j1"), "v", 99)

        assert worker.claim("j1").status is ClaimStatus.UNKNOWN_SCHEMA
        assert state(fake_redis) == "queued"

    @pytest.mark.parametrize(("event", "status"), [(done(), ClaimStatus.DONE), (failed(), ClaimStatus.FAILED)])
    def test_an_ended_job_is_not_taken(
        self, fake_redis: redis.Redis, worker: ActingWorker, event: Failed, status: ClaimStatus
    ) -> None:
        submit(fake_redis)
        worker.claim("j1")
        worker.emit("j1", event)

        assert worker.claim("j1").status is status

    def test_a_requested_cancel_is_honoured_by_the_next_claim(
        self, fake_redis: redis.Redis, worker: ActingWorker
    ) -> None:
        submit(fake_redis)
        worker.claim("j1")
        call(fake_redis, cancel_call(KEYS, "j1"))
        expire_lease(fake_redis)

        assert worker.claim("j1").status is ClaimStatus.CANCELLED
        assert events(fake_redis) == [("1-0", "cancelled")]


class TestEmit:
    def test_events_are_numbered_without_gaps(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")

        worker.emit("j1", token("a"), token("b"))
        worker.emit("j1", token("c"), done(3))

        assert [entry for entry, _ in events(fake_redis)] == ["1-0", "2-0", "3-0", "4-0"]

    def test_a_repeated_call_stores_nothing_twice(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")
        worker.emit("j1", token("a"), token("b"))

        again = worker.emit_at("j1", 1, (token("a"), token("b")))

        assert again.status is EmitStatus.OK
        assert len(events(fake_redis)) == 2

    def test_a_repeated_terminal_call_is_harmless(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")
        worker.emit("j1", token("a"), done())

        again = worker.emit_at("j1", 1, (token("a"), done()))

        assert again.status is EmitStatus.OK
        assert [kind for _, kind in events(fake_redis)] == ["token", "done"]

    def test_a_gap_is_refused(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")

        assert worker.emit_at("j1", 3, (token("c"),)).status is EmitStatus.GAP
        assert events(fake_redis) == []

    def test_nothing_is_taken_after_the_end(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")
        worker.emit("j1", done())

        assert worker.emit("j1", token("late")).status is EmitStatus.FENCED

    def test_a_lost_record_is_missing(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")
        fake_redis.flushall()

        assert worker.emit("j1", token("a")).status is EmitStatus.MISSING

    def test_without_events_it_renews_the_lease_and_tells_of_a_cancel(
        self, fake_redis: redis.Redis, worker: ActingWorker
    ) -> None:
        submit(fake_redis)
        worker.claim("j1")
        call(fake_redis, cancel_call(KEYS, "j1"))
        fake_redis.hset(KEYS.job("j1"), "lease_until", 5)

        reply = worker.emit("j1")

        assert reply == (EmitStatus.OK, True, False)
        assert int(fake_redis.hget(KEYS.job("j1"), "lease_until") or 0) > time.time() * 1000

    def test_the_terminal_event_settles_the_record(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")

        worker.emit("j1", token("a"), done())

        status = decode_status("j1", fake_redis.hmget(KEYS.job("j1"), STATUS_FIELDS))
        assert status is not None
        assert (status.state, status.events, status.outcome) == ("done", 2, done())
        assert status.finished_at is not None
        assert 0 < fake_redis.ttl(KEYS.job("j1")) <= wire_keys.FINISHED_TTL_S
        assert 0 < fake_redis.ttl(KEYS.stream("j1")) <= wire_keys.FINISHED_TTL_S
        assert fake_redis.zcard(KEYS.active) == 0

    def test_a_terminal_event_can_only_be_the_last(self) -> None:
        with pytest.raises(ValueError, match="last"):
            emit_call(KEYS, "j1", 1, 1, 1000, (done(), token("a")))

    def test_text_survives_as_it_is(self, fake_redis: redis.Redis, worker: ActingWorker) -> None:
        submit(fake_redis)
        worker.claim("j1")
        text = 'héllo "\\" \x00 🦙\n'

        worker.emit("j1", token(text))

        stored = fake_redis.xrange(KEYS.stream("j1"))[0][1]["e"]
        assert decode_event(stored) == token(text)


@pytest.mark.parametrize("raw", [None, [], ["what", 0], ["ok"], [1, 2], "ok"])
def test_an_unreadable_reply_is_a_decode_error(raw: object) -> None:
    script_call = emit_call(KEYS, "j1", 1, 1, 1000, ())

    with pytest.raises(DecodeError):
        script_call.decode(raw)
