"""Limits, deadlines, estimates, and jobs of older and newer versions; on fakeredis, without a worker's process."""

from __future__ import annotations

import pytest

from lamella.messages import Failed, Priority
from lamella.queue_calls import expire_call, tend_call
from lamella.registry_calls import (
    ClaimStatus,
    NudgeStatus,
    SubmitStatus,
    cancel_call,
    deadline_event,
    nudge_call,
)
from tests.client.acting_worker import MODEL, call, token
from tests.client.queue_service import COST, KEYS, Service


class TestLimits:
    def test_a_users_jobs_in_flight_are_limited_and_others_pass(self, service: Service) -> None:
        service.serve(5)
        service.client.hset(KEYS.limits, "user_running", 2)
        for number in range(6):
            service.submit(f"a{number}", "a")
        service.submit("b0", "b")

        assert service.sent() == {"a0", "a1", "b0"}
        assert set(service.run(10)) == {*(f"a{number}" for number in range(6)), "b0"}

    def test_a_raised_limit_lets_held_users_go_on(self, service: Service) -> None:
        service.client.hset(KEYS.limits, "user_running", 0)
        service.submit("a")
        service.client.hdel(KEYS.limits, "user_running")

        call(service.client, tend_call(KEYS, MODEL))

        assert service.sent() == {"a"}

    def test_a_users_own_limit_counts_before_everybodys(self, service: Service) -> None:
        service.client.hset(KEYS.limits, "user_queued", 0)
        service.client.hset(KEYS.user_limits("trusted"), "queued", 1)

        assert service.submit("a", "stranger").status is SubmitStatus.USER_FULL
        assert service.submit("b", "trusted").status is SubmitStatus.CREATED

    def test_tokens_of_a_user_are_limited_until_jobs_end(self, service: Service) -> None:
        service.client.hset(KEYS.limits, "user_tokens", 2 * COST)
        service.submit("a", "u")
        service.submit("b", "u")

        refused = service.submit("c", "u")
        service.run(1)

        assert (refused.status, refused.queued, refused.limit) == (SubmitStatus.USER_TOKENS, 2 * COST, 2 * COST)
        assert refused.retry_after_s > 0
        assert service.submit("c", "u").status is SubmitStatus.CREATED


class TestDeadlines:
    def test_a_job_that_waits_past_its_deadline_fails_with_deadline(self, service: Service) -> None:
        service.serve(0)
        service.submit("a", deadline_s=0.001)
        service.client.zadd(KEYS.deadlines, {"a": 1})

        looked_at = call(service.client, expire_call(KEYS, 10))

        assert looked_at == 1
        assert service.outcome("a") == deadline_event()
        assert service.client.zcard(KEYS.active) == 0

    def test_an_overdue_job_takes_no_slot(self, service: Service) -> None:
        service.submit("a")
        service.submit("b")
        service.submit("late", deadline_s=100)
        service.submit("c")
        service.client.hset(KEYS.job("late"), "deadline", 1)

        assert service.run(5) == ["a", "b", "c"]
        assert service.outcome("late") == deadline_event()

    def test_a_running_job_is_told_to_stop(self, service: Service) -> None:
        service.submit("a", deadline_s=100)
        service.start()
        service.client.hset(KEYS.job("a"), "deadline", 1)

        reply = service.worker.emit("a", token("kept"))
        service.worker.emit("a", deadline_event())

        assert reply.is_overdue
        assert isinstance(service.outcome("a"), Failed)
        assert service.client.xlen(KEYS.stream("a")) == 2

    def test_expired_jobs_are_ended_in_batches(self, service: Service) -> None:
        service.serve(0)
        for number in range(5):
            service.submit(f"j{number}", deadline_s=100)
            service.client.zadd(KEYS.deadlines, {f"j{number}": 1})

        assert [call(service.client, expire_call(KEYS, 2)) for _ in range(4)] == [2, 2, 1, 0]

    def test_only_what_is_surely_hopeless_is_refused(self, service: Service) -> None:
        for number in range(30):
            service.submit(f"j{number}")
        service.run(10, num_tokens=100, run_s=10.0)  # 10 tokens a second; 20 jobs of 10 s wait

        hopeless = service.submit("hopeless", deadline_s=20)
        unlikely = service.submit("unlikely", deadline_s=150)
        urgent = service.submit("urgent", priority=Priority.HIGH, deadline_s=20)

        assert hopeless.status is SubmitStatus.HOPELESS
        assert 150 <= hopeless.estimate_s <= 250
        assert service.state("hopeless") is None
        assert unlikely.status is SubmitStatus.CREATED
        assert urgent.status is SubmitStatus.CREATED

    def test_nothing_is_hopeless_while_no_pace_was_measured(self, service: Service) -> None:
        for number in range(30):
            service.submit(f"j{number}")

        assert service.submit("a", deadline_s=0.5).status is SubmitStatus.CREATED


class TestOutlook:
    def test_position_and_times_follow_the_pace_measured(self, service: Service) -> None:
        for number in range(30):
            service.submit(f"j{number}")
        service.run(10, num_tokens=100, run_s=10.0)

        outlook = service.outlook("j22")

        assert outlook.position == 10, "j10 and j11 are in flight"
        assert outlook.starts_in_s == pytest.approx(110, rel=0.2)
        assert outlook.ends_in_s == pytest.approx(120, rel=0.2)

    def test_another_user_stands_nearer_the_front_than_a_flooder(self, service: Service) -> None:
        for number in range(100):
            service.submit(f"j{number}", "flooder")
        service.submit("mine", "other")

        position = service.outlook("mine").position

        assert position is not None
        assert position <= 1
        order = service.run(5)
        assert abs(order.index("mine") - 2 - position) <= 1

    def test_nothing_is_claimed_to_be_known_before_a_job_ended(self, service: Service) -> None:
        service.submit("a")

        outlook = service.outlook("a")

        assert (outlook.position, outlook.starts_in_s, outlook.ends_in_s) == (0, None, None)
        assert "pace is not known" in outlook.basis


class TestUpgrade:
    """Records and messages of versions whose jobs went straight into Celery's queue."""

    @pytest.fixture
    def old_job(self, service: Service) -> str:
        service.submit("template")
        record = service.client.hgetall(KEYS.job("template"))
        request = record["request"]
        call(service.client, cancel_call(KEYS, "template"))
        service.client.hset(
            KEYS.job("old"),
            mapping={
                "v": 1, "state": "queued", "model": MODEL, "request": request, "message": "{}", "created_at": 1,
                "attempts": 0, "fence": 0, "lease_until": 0, "seq": 0, "nudged_at": 1, "nudges": 0,
            },
        )  # fmt: skip
        service.client.zadd(KEYS.active, {"old": 1})
        return "old"

    def test_its_message_still_runs_it_and_it_counts_as_in_flight(self, service: Service, old_job: str) -> None:
        assert service.worker.claim(old_job).status is ClaimStatus.OK
        assert service.sent() == {old_job}

        service.end(old_job)

        assert service.state(old_job) == "done"
        assert service.sent() == set()

    def test_its_lost_message_is_sent_again(self, service: Service, old_job: str) -> None:
        assert call(service.client, nudge_call(KEYS, old_job, MODEL, 1)) is NudgeStatus.NUDGED
        assert service.start() == old_job

    def test_it_can_be_cancelled(self, service: Service, old_job: str) -> None:
        call(service.client, cancel_call(KEYS, old_job))

        assert service.state(old_job) == "cancelled"
        assert service.client.zcard(KEYS.active) == 0

    def test_a_waiting_job_whose_message_an_older_version_sent_leaves_its_line(self, service: Service) -> None:
        service.serve(0)
        service.submit("a")

        assert service.worker.claim("a").status is ClaimStatus.OK

        assert service.sent() == {"a"}
        service.end("a")
        assert service.client.hget(f"{KEYS.prefix}queue:{MODEL}", "n1") == "0"

    def test_a_job_that_an_older_version_ended_gives_its_place_back(self, service: Service) -> None:
        service.submit("a")
        service.submit("b")
        service.submit("c")
        service.client.hset(KEYS.job("a"), "state", "done")

        assert call(service.client, nudge_call(KEYS, "a", MODEL, 1)) is NudgeStatus.GONE

        assert service.sent() == {"b", "c"}

    def test_jobs_of_a_newer_schema_take_no_place_in_flight(self, service: Service) -> None:
        for number in range(4):
            service.submit(f"j{number}")
        service.client.hset(KEYS.job("j0"), "v", 99)

        assert service.worker.claim("j0").status is ClaimStatus.UNKNOWN_SCHEMA

        assert service.sent() == {"j1", "j2"}
        assert call(service.client, nudge_call(KEYS, "j0", MODEL, 0)) is NudgeStatus.NUDGED
