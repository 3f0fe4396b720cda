"""Which waiting job goes next, when none does, and what is refused; on fakeredis, without a worker's process."""

from __future__ import annotations

import json

import pytest
import redis

from lamella.keys import Keys
from lamella.messages import Done, Failed, GenerateRequest, Priority, SamplingParams, Usage, decode_event
from lamella.queue_calls import Outlook, expire_call, outlook_call, serve_call, tend_call
from lamella.queue_terms import QueueTerms
from lamella.registry_calls import (
    ClaimStatus,
    NudgeStatus,
    SubmitReply,
    SubmitStatus,
    cancel_call,
    deadline_event,
    nudge_call,
    release_call,
    submit_call,
)
from tests.client.acting_worker import MODEL, ActingWorker, call, token

KEYS = Keys()
COST = 101  # of each job here: a prompt of one token and 100 to come


class Service:
    """Submits jobs and ends them in the order in which they are sent."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.worker = ActingWorker(client)
        self.started: list[str] = []

    def serve(self, slots: int) -> None:
        call(self.client, serve_call(KEYS, "w", MODEL, slots))

    def submit(
        self,
        job_id: str,
        user: str = "anonymous",
        priority: Priority = Priority.NORMAL,
        deadline_s: float | None = None,
        *,
        ignore_eos: bool = False,
    ) -> SubmitReply:
        sampling = SamplingParams(max_tokens=100, ignore_eos=ignore_eos)
        request = GenerateRequest(model=MODEL, prompt="hi", sampling=sampling)
        return call(self.client, submit_call(KEYS, job_id, request, QueueTerms(user, priority, deadline_s)))

    def start(self) -> str | None:
        """Take the next message, claim its job, and return its id."""
        raw = self.client.rpop(KEYS.queue_list(MODEL))
        if raw is None:
            return None
        job_id = str(json.loads(str(raw))["headers"]["id"])
        if self.worker.claim(job_id).status is not ClaimStatus.OK:
            return None
        self.started.append(job_id)
        return job_id

    def end(self, job_id: str, num_tokens: int = 100, run_s: float = 0.0) -> None:
        """End a running job after so many tokens, as if it had run so long."""
        started_at = int(self.client.hget(KEYS.job(job_id), "started_at") or 0)
        self.client.hset(KEYS.job(job_id), "started_at", started_at - int(run_s * 1000))
        usage = Usage(prompt_tokens=1, completion_tokens=num_tokens)
        self.worker.emit(job_id, token("a"), Done(finish_reason="stop", usage=usage))

    def run(self, count: int, num_tokens: int = 100, run_s: float = 0.0) -> list[str]:
        """Start and end so many jobs, one after the other, and return their ids in order."""
        before = len(self.started)
        for _ in range(count):
            job_id = self.start()
            if job_id is None:
                break
            self.end(job_id, num_tokens, run_s)
        return self.started[before:]

    def sent(self) -> set[str]:
        return set(self.client.zrange(KEYS.flight(MODEL), 0, -1))

    def state(self, job_id: str) -> str | None:
        return self.client.hget(KEYS.job(job_id), "state")

    def outcome(self, job_id: str) -> object:
        return decode_event(self.client.hget(KEYS.job(job_id), "outcome") or "")

    def outlook(self, job_id: str) -> Outlook:
        return call(self.client, outlook_call(KEYS, job_id))


@pytest.fixture
def service(fake_redis: redis.Redis) -> Service:
    service = Service(fake_redis)
    service.serve(1)
    return service


class TestDispatch:
    def test_a_job_for_an_idle_worker_is_sent_with_its_submit(self, service: Service) -> None:
        service.submit("a")

        assert service.start() == "a"

    def test_one_job_more_than_slots_is_sent_and_the_rest_waits(self, service: Service) -> None:
        service.serve(3)

        for number in range(10):
            service.submit(f"j{number}")

        assert len(service.sent()) == 4
        assert service.client.llen(KEYS.queue_list(MODEL)) == 4

    def test_each_end_sends_the_next(self, service: Service) -> None:
        for number in range(10):
            service.submit(f"j{number}")

        assert service.run(20) == [f"j{number}" for number in range(10)]

    def test_nothing_is_sent_while_no_worker_serves_and_all_fits_when_one_comes(self, service: Service) -> None:
        service.serve(0)
        for number in range(5):
            service.submit(f"j{number}")
        assert service.sent() == set()

        service.serve(2)

        assert len(service.sent()) == 3

    def test_a_worker_that_fell_silent_counts_no_more(self, service: Service) -> None:
        service.serve(0)
        service.client.hset(KEYS.serving(MODEL), "silent", "50 1000")

        service.serve(2)

        assert service.client.get(KEYS.capacity(MODEL)) == "2"

    def test_a_cancelled_job_makes_room_at_once_and_leaves_no_message(self, service: Service) -> None:
        for number in range(5):
            service.submit(f"j{number}")

        for number in range(3):
            call(service.client, cancel_call(KEYS, f"j{number}"))

        assert service.client.llen(KEYS.queue_list(MODEL)) == 2
        assert service.run(5) == ["j3", "j4"]

    def test_a_released_job_goes_before_its_users_others_and_keeps_its_order(self, service: Service) -> None:
        service.serve(2)
        for number in range(6):
            service.submit(f"j{number}")
        first, second = service.start(), service.start()
        service.serve(0)

        for job_id in (second, first):
            assert job_id is not None
            call(service.client, release_call(KEYS, job_id, service.worker.fences[job_id], True))
        service.serve(2)

        assert service.run(6) == ["j2", "j0", "j1", "j3", "j4", "j5"], "j2 was with Celery already"

    def test_a_lost_message_is_sent_again_and_takes_no_second_place(self, service: Service) -> None:
        service.submit("a")
        service.client.delete(KEYS.queue_list(MODEL))

        answer = call(service.client, nudge_call(KEYS, "a", MODEL, 0))

        assert answer is NudgeStatus.NUDGED
        assert service.sent() == {"a"}
        assert service.start() == "a"


class TestOrder:
    def test_a_user_who_floods_does_not_delay_another_by_more_than_a_job(self, service: Service) -> None:
        for number in range(1000):
            service.submit(f"flood{number}", "flooder")
        service.run(10)
        service.submit("mine0", "other")
        service.submit("mine1", "other")
        service.submit("mine2", "other")

        order = service.run(8)

        # Two flood jobs are in flight already, one for the slot and one more; then the two take turns.
        assert [order.index(f"mine{number}") for number in range(3)] == [2, 4, 6]

    def test_shares_follow_weights(self, service: Service) -> None:
        service.client.hset(KEYS.user_limits("heavy"), "weight", 3)
        for number in range(60):
            service.submit(f"h{number}", "heavy")
            service.submit(f"l{number}", "light")

        order = service.run(40)

        heavy = sum(job_id.startswith("h") for job_id in order)
        assert abs(heavy - 30) <= 1

    def test_a_user_pays_for_tokens_not_for_jobs(self, service: Service) -> None:
        for number in range(100):
            service.submit(f"short{number}", "short")
            service.submit(f"long{number}", "long")

        order: list[str] = []
        for _ in range(80):
            job_id = service.start()
            assert job_id is not None
            service.end(job_id, 9 if job_id.startswith("short") else 99)
            order.append(job_id)

        used = {"short": 0, "long": 0}
        for job_id in order:
            used["short" if job_id.startswith("short") else "long"] += 10 if job_id.startswith("short") else 100
        assert abs(used["short"] - used["long"]) <= 2 * COST

    def test_an_idle_user_gains_no_credit(self, service: Service) -> None:
        service.submit("early", "idler")
        for number in range(100):
            service.submit(f"b{number}", "busy")
        service.run(50)

        for number in range(20):
            service.submit(f"i{number}", "idler")
        order = service.run(21)

        assert sum(job_id.startswith("i") for job_id in order) in (10, 11)

    def test_higher_classes_go_first_and_none_starves(self, service: Service) -> None:
        service.submit("first")
        for number in range(60):
            for priority in Priority:
                service.submit(f"{priority.value}{number}", "me", priority)

        order = service.run(36)[2:]

        counts = {priority: sum(job_id.startswith(priority.value) for job_id in order) for priority in Priority}
        assert counts == {Priority.HIGH: 30, Priority.NORMAL: 2, Priority.LOW: 2}
        assert all(job_id.startswith("high") for job_id in order[:10])

    def test_a_jobs_class_has_a_fair_queue_of_its_own(self, service: Service) -> None:
        service.submit("first")
        for number in range(10):
            service.submit(f"a{number}", "a", Priority.HIGH)
        service.run(11)
        for number in range(4):
            service.submit(f"na{number}", "a")
            service.submit(f"nb{number}", "b")

        order = service.run(8)

        assert [job_id[1] for job_id in order] in (list("abababab"), list("abbaabab"), list("abbababa"))


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
        service.client.hset(KEYS.job("j0"), "v", 2)

        assert service.worker.claim("j0").status is ClaimStatus.UNKNOWN_SCHEMA

        assert service.sent() == {"j1", "j2"}
        assert call(service.client, nudge_call(KEYS, "j0", MODEL, 0)) is NudgeStatus.NUDGED
