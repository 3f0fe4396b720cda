"""Which waiting job goes next, and when none does; on fakeredis, without a worker's process."""

from __future__ import annotations

from lamella.messages import Priority
from lamella.registry_calls import (
    NudgeStatus,
    cancel_call,
    nudge_call,
    release_call,
)
from tests.client.acting_worker import MODEL, call
from tests.client.queue_service import COST, KEYS, Service


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
