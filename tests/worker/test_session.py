"""The life of a job on a worker, from its claim to its last word or its way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fakeredis
import pytest
import redis

from lamella.keys import Keys
from lamella.messages import JobState
from lamella.registry_calls import cancel_call, claim_call
from lamella_worker.registry import Registry
from lamella_worker.session import Verdict
from tests.waiting import wait_until
from tests.worker.conftest import Bench, Jobs
from tests.worker.scripted_engine import scripted_text

ENDLESS = 1_000_000


def num_events(jobs: Jobs, job_id: str) -> int:
    return int(jobs.record(job_id)["seq"])


def test_a_job_runs_to_its_end_and_its_message_is_done_with(bench: Bench, jobs: Jobs) -> None:
    jobs.submit("a", "hello", max_tokens=5)

    verdict = bench.session.run("a")

    assert verdict is Verdict.ACK
    assert jobs.text("a") == scripted_text("hello", 5)
    assert jobs.events("a")[-1].usage.completion_tokens == 5
    assert jobs.state("a") is JobState.DONE


@pytest.mark.parametrize("state", ["missing", "done", "held"])
def test_a_job_that_is_not_ours_to_run_is_left_alone(
    bench: Bench, jobs: Jobs, registry: Registry, state: str, keys: Keys
) -> None:
    if state != "missing":
        jobs.submit("a", max_tokens=2)
    if state == "done":
        bench.session.run("a")
    if state == "held":
        registry.call(claim_call(keys, "a", "other", 60_000, 3))
    before = jobs.record("a")

    verdict = bench.session.run("a")

    assert verdict is Verdict.ACK
    assert jobs.record("a") == before


def test_a_job_of_a_newer_schema_is_parked_untouched(
    bench: Bench, jobs: Jobs, fake_redis: redis.Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    jobs.submit("a")
    fake_redis.hset(keys.job("a"), "v", "99")

    verdicts = [bench.session.run("a") for _ in range(3)]

    assert verdicts == [Verdict.ACK] * 3
    assert jobs.state("a") is JobState.QUEUED
    assert sum("newer schema" in record.message for record in caplog.records) == 1


def test_a_job_for_another_model_fails_and_says_so(bench: Bench, jobs: Jobs) -> None:
    jobs.submit("a", model="other")

    bench.session.run("a")

    (event,) = jobs.events("a")
    assert (event.type, event.code) == ("failed", "wrong_model")
    assert "other" in event.message


def test_a_request_that_cannot_be_read_fails_and_says_so(
    bench: Bench, jobs: Jobs, fake_redis: redis.Redis, keys: Keys
) -> None:
    jobs.submit("a")
    fake_redis.hset(keys.job("a"), "request", '{"model": "tiny"}')

    bench.session.run("a")

    (event,) = jobs.events("a")
    assert (event.type, event.code) == ("failed", "bad_request")


def test_a_sequence_that_the_engine_refuses_fails_with_its_code(bench: Bench, jobs: Jobs) -> None:
    jobs.submit("a", "bad prompt")

    verdict = bench.session.run("a")

    (event,) = jobs.events("a")
    assert verdict is Verdict.ACK
    assert (event.type, event.code) == ("failed", "prompt_too_long")


def test_a_claimed_job_goes_on_after_its_last_stored_token(
    make_bench: Callable[..., Bench], jobs: Jobs, run: Any, config: Any
) -> None:
    first, second = make_bench("w1"), make_bench("w2")
    jobs.submit("a", "hello", max_tokens=200)
    running = run(first, "a")
    wait_until(lambda: num_events(jobs, "a") > 10)
    first.session.begin_drain()
    assert running.result(40) is Verdict.ACK
    num_before = num_events(jobs, "a")

    verdict = second.session.run("a")

    assert verdict is Verdict.ACK
    assert 10 < num_before < 200
    assert jobs.text("a") == scripted_text("hello", 200)
    assert len(jobs.events("a")) == 201


def test_a_drain_gives_all_jobs_back_with_their_attempts(bench: Bench, jobs: Jobs, run: Any) -> None:
    tasks = [run(bench, jobs.submit(job_id, max_tokens=ENDLESS)) for job_id in ("a", "b", "c")]
    wait_until(lambda: all(num_events(jobs, job_id) > 2 for job_id in ("a", "b", "c")))

    bench.session.begin_drain()

    assert [task.result(40) for task in tasks] == [Verdict.ACK] * 3
    assert bench.session.wait_idle(1)
    for job_id in ("a", "b", "c"):
        assert jobs.state(job_id) is JobState.QUEUED
        assert jobs.record(job_id)["attempts"] == "0"
        assert jobs.events(job_id)[-1].type == "token"


def test_a_draining_worker_takes_no_job(bench: Bench, jobs: Jobs) -> None:
    jobs.submit("a")
    bench.session.begin_drain()

    verdict = bench.session.run("a")

    assert verdict is Verdict.REQUEUE
    assert jobs.record("a")["attempts"] == "0"


def test_giving_up_releases_jobs_that_a_hung_sweep_holds(bench: Bench, jobs: Jobs, run: Any) -> None:
    task = run(bench, jobs.submit("a", max_tokens=ENDLESS))
    wait_until(lambda: num_events(jobs, "a") > 2)
    bench.engine.hold()
    bench.session.begin_drain()

    bench.session.give_up()

    assert task.result(40) is Verdict.ACK
    assert jobs.state("a") is JobState.QUEUED
    assert jobs.record("a")["attempts"] == "0"


def test_a_cancel_ends_the_job_at_the_next_boundary_and_frees_its_place(
    bench: Bench, jobs: Jobs, run: Any, registry: Registry, keys: Keys
) -> None:
    task = run(bench, jobs.submit("a", max_tokens=ENDLESS))
    wait_until(lambda: num_events(jobs, "a") > 2)

    registry.call(cancel_call(keys, "a"))

    assert task.result(40) is Verdict.ACK
    assert jobs.events("a")[-1].type == "cancelled"
    assert jobs.state("a") is JobState.CANCELLED
    assert bench.engine.sequence_ids == []


def test_a_deadline_stops_the_job_at_the_next_boundary_and_keeps_its_text(
    bench: Bench, jobs: Jobs, run: Any, fake_redis: redis.Redis, keys: Keys
) -> None:
    task = run(bench, jobs.submit("a", max_tokens=ENDLESS))
    wait_until(lambda: num_events(jobs, "a") > 2)

    fake_redis.hset(keys.job("a"), "deadline", 1)

    assert task.result(40) is Verdict.ACK
    *tokens, last = jobs.events("a")
    assert (last.type, last.code) == ("failed", "deadline")
    assert len(tokens) > 2
    assert jobs.state("a") is JobState.FAILED
    assert bench.engine.sequence_ids == []


def test_a_deadline_stops_a_job_that_only_reads_its_prompt(
    bench: Bench, jobs: Jobs, run: Any, fake_redis: redis.Redis, keys: Keys
) -> None:
    task = run(bench, jobs.submit("a", "slow prompt"))
    wait_until(lambda: jobs.record("a")["state"] == "running")

    fake_redis.hset(keys.job("a"), "deadline", 1)

    assert task.result(40) is Verdict.ACK
    assert [(event.type, event.code) for event in jobs.events("a")] == [("failed", "deadline")]


def test_a_job_that_is_given_back_is_free_for_its_next_message(
    bench: Bench, jobs: Jobs, fake_redis: redis.Redis, keys: Keys
) -> None:
    jobs.submit("a", "crash now")
    fake_redis.delete(keys.queue_list("tiny"))

    verdict = bench.session.run("a")

    assert verdict is Verdict.ACK
    assert jobs.queue() == ["a"], "its next message is there before the last one is acknowledged"
    assert bench.session.run("a") is Verdict.ACK
    assert jobs.record("a")["attempts"] == "2"


def test_a_job_that_only_reads_its_prompt_keeps_its_lease_and_can_be_cancelled(
    bench: Bench, jobs: Jobs, run: Any, registry: Registry, keys: Keys
) -> None:
    task = run(bench, jobs.submit("a", "slow prompt"))
    wait_until(lambda: jobs.record("a")["state"] == "running")
    first_lease = int(jobs.record("a")["lease_until"])
    wait_until(lambda: int(jobs.record("a")["lease_until"]) > first_lease + 600)

    registry.call(cancel_call(keys, "a"))

    assert task.result(40) is Verdict.ACK
    assert jobs.state("a") is JobState.CANCELLED


def test_a_job_in_a_stalled_engine_keeps_its_lease(bench: Bench, jobs: Jobs, run: Any) -> None:
    task = run(bench, jobs.submit("a", max_tokens=300))
    wait_until(lambda: num_events(jobs, "a") > 2)
    bench.engine.hold()
    held_lease = int(jobs.record("a")["lease_until"])

    wait_until(lambda: int(jobs.record("a")["lease_until"]) > held_lease + 1200)

    bench.engine.go_on()
    assert task.result(40) is Verdict.ACK
    assert jobs.state("a") is JobState.DONE


def test_a_sweep_that_fails_costs_an_attempt_and_the_last_one_fails_the_job(bench: Bench, jobs: Jobs) -> None:
    jobs.submit("a", "crash now")

    verdicts = [bench.session.run("a") for _ in range(4)]

    assert verdicts == [Verdict.ACK] * 4
    (event,) = jobs.events("a")
    assert (event.type, event.code) == ("failed", "attempts_exhausted")


def test_a_job_that_fails_sweeps_does_not_take_its_neighbours_down(bench: Bench, jobs: Jobs, run: Any) -> None:
    job_ids = ["poison", "b", "c"]
    jobs.submit("poison", "crash now")
    for job_id in job_ids[1:]:
        jobs.submit(job_id, "hello", max_tokens=100)

    while any(jobs.state(job_id) in (JobState.QUEUED, JobState.RUNNING) for job_id in job_ids):
        for task in [run(bench, job_id) for job_id in job_ids]:
            task.result(40)

    assert jobs.state("poison") is JobState.FAILED
    assert [jobs.text(job_id) for job_id in job_ids[1:]] == [scripted_text("hello", 100)] * 2


def test_a_second_message_for_a_running_job_is_dropped(bench: Bench, jobs: Jobs, run: Any) -> None:
    task = run(bench, jobs.submit("a", max_tokens=ENDLESS))
    wait_until(lambda: num_events(jobs, "a") > 2)

    verdict = bench.session.run("a")

    assert verdict is Verdict.ACK
    assert not task.done()
    assert jobs.record("a")["attempts"] == "1"


def test_a_job_waits_to_be_claimed_while_redis_is_away(
    bench: Bench, jobs: Jobs, run: Any, fake_server: fakeredis.FakeServer
) -> None:
    jobs.submit("a", "hello", max_tokens=3)
    fake_server.connected = False
    task = run(bench, "a")
    wait_until(lambda: task.running())

    fake_server.connected = True

    assert task.result(40) is Verdict.ACK
    assert jobs.text("a") == scripted_text("hello", 3)


def test_a_running_job_outlasts_a_redis_that_is_away(
    bench: Bench, jobs: Jobs, run: Any, fake_server: fakeredis.FakeServer
) -> None:
    task = run(bench, jobs.submit("a", "hello", max_tokens=200))
    wait_until(lambda: num_events(jobs, "a") > 5)
    fake_server.connected = False
    sweeps = bench.engine.counters().sweeps
    wait_until(lambda: bench.engine.counters().sweeps >= sweeps + 2)  # the engine stalls on its bound

    fake_server.connected = True

    assert task.result(40) is Verdict.ACK
    assert jobs.text("a") == scripted_text("hello", 200)
    assert len(jobs.events("a")) == 201


class LosesFirstClaim(fakeredis.FakeRedis):
    """A server whose connection breaks right after the first script ran."""

    has_lost = False

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Any:
        pipe = super().pipeline(transaction, shard_hint)
        run = pipe.execute

        def execute(raise_on_error: bool = True) -> Any:
            answers = run(raise_on_error)
            if not self.has_lost:
                self.has_lost = True
                raise redis.ConnectionError("the answer was lost")
            return answers

        pipe.execute = execute
        return pipe


def test_a_claim_whose_answer_was_lost_costs_neither_time_nor_attempt(
    make_bench: Callable[..., Bench], jobs: Jobs, fake_server: fakeredis.FakeServer, keys: Keys
) -> None:
    jobs.submit("a", "hello", max_tokens=3)
    client = LosesFirstClaim(server=fake_server, protocol=2, decode_responses=True)
    bench = make_bench(registry=Registry(client, keys))

    verdict = bench.session.run("a")

    assert verdict is Verdict.ACK
    assert jobs.text("a") == scripted_text("hello", 3)
    assert jobs.record("a")["attempts"] == "1"


def test_a_job_whose_record_vanishes_is_dropped_and_the_session_goes_on(
    bench: Bench, jobs: Jobs, run: Any, fake_redis: redis.Redis
) -> None:
    task = run(bench, jobs.submit("a", max_tokens=ENDLESS))
    wait_until(lambda: num_events(jobs, "a") > 2)

    fake_redis.flushall()

    assert task.result(40) is Verdict.ACK
    wait_until(lambda: bench.engine.sequence_ids == [])
    jobs.submit("b", "hello", max_tokens=3)
    assert bench.session.run("b") is Verdict.ACK
    assert jobs.text("b") == scripted_text("hello", 3)


def test_a_job_with_a_lost_stream_fails_and_says_so(
    bench: Bench, jobs: Jobs, run: Any, fake_redis: redis.Redis, keys: Keys, make_bench: Callable[..., Bench]
) -> None:
    task = run(bench, jobs.submit("a", max_tokens=ENDLESS))
    wait_until(lambda: num_events(jobs, "a") > 2)
    bench.session.begin_drain()
    task.result(40)
    fake_redis.delete(keys.stream("a"))

    make_bench("w2").session.run("a")

    outcome = jobs.record("a")["outcome"]
    assert '"code":"stream_lost"' in outcome


def test_jobs_share_sweeps(bench: Bench, jobs: Jobs, run: Any) -> None:
    tasks = [run(bench, jobs.submit(f"j{n}", "hello", max_tokens=100)) for n in range(8)]

    assert [task.result(40) for task in tasks] == [Verdict.ACK] * 8
    assert bench.engine.widest == 8
    assert bench.engine.counters().sweeps < 400
    assert {jobs.text(f"j{n}") for n in range(8)} == {scripted_text("hello", 100)}


def test_a_publisher_that_ends_gives_every_job_back(bench: Bench, jobs: Jobs, run: Any) -> None:
    task = run(bench, jobs.submit("a", max_tokens=ENDLESS))
    wait_until(lambda: num_events(jobs, "a") > 2)

    bench.engine.close()

    assert task.result(40) is Verdict.ACK
    assert jobs.record("a")["attempts"] == "0"
