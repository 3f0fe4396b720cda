"""From a sweep's events to the stream: what each means for its job."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from lamella.messages import TokenLogprob
from lamella.registry_calls import claim_call
from lamella_engine.sequence_types import (
    FinishReason,
    SequenceFinished,
    SequencePrefill,
    SequenceTokens,
    SweepEvents,
    TokenLogprobs,
)
from lamella_worker.delivery import Delivery
from lamella_worker.job_table import JobTable
from lamella_worker.publisher import Publisher
from lamella_worker.registry import Registry
from lamella_worker.running_job import Outcome, RunningJob
from tests.waiting import wait_until
from tests.worker.conftest import Jobs
from tests.worker.scripted_engine import ScriptedEngine


class BrokenEngine(ScriptedEngine):
    """Its events end in an exception."""

    def events(self, poll_s: float = 0.5) -> Iterator[SweepEvents]:
        yield SweepEvents(())
        raise RuntimeError("the engine's pipe broke")


@pytest.fixture
def ended() -> list[bool]:
    return []


@pytest.fixture
def table() -> JobTable:
    return JobTable()


@pytest.fixture
def publisher(registry: Registry, table: JobTable, ended: list[bool]) -> Iterator[Publisher]:
    engine = ScriptedEngine()
    delivery = Delivery(registry, 5.0, engine.cancel, threading.Event())
    yield Publisher(engine, table, delivery, ended.append)
    engine.close()


@pytest.fixture
def job(registry: Registry, jobs: Jobs, table: JobTable) -> Iterator[RunningJob]:
    jobs.submit("a")
    reply = registry.call(claim_call(registry.keys, "a", "w1", 5000, 3))
    job = RunningJob("a", reply.fence, reply.seq + 1, reply.attempts)
    with table.listed(job):
        yield job


def finished(
    job: RunningJob, reason: FinishReason, code: str | None = None, error: str | None = None
) -> SequenceFinished:
    return SequenceFinished(job.sequence_id, reason, 3, 2, 5, 600, 0.7, code, error)


def test_tokens_and_the_end_of_one_sweep_are_stored_together(publisher: Publisher, jobs: Jobs, job: RunningJob) -> None:
    logprobs = (TokenLogprobs(7, -0.5, ((7, -0.5), (8, -1.5))),)
    tokens = SequenceTokens(job.sequence_id, 0, (7,), "x", logprobs)

    publisher.publish(SweepEvents((tokens, finished(job, FinishReason.STOP))))

    token, done = jobs.events("a")
    assert (token.token_ids, token.text) == ((7,), "x")
    assert token.logprobs == (TokenLogprob(token_id=7, logprob=-0.5, top=((7, -0.5), (8, -1.5))),)
    assert done.finish_reason == "stop"
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.sweeps) == (3, 2, 5)
    assert (usage.streamed_bytes, usage.run_s) == (600, 0.7)
    assert job.wait(0) is Outcome.ENDED


def test_reading_the_prompt_stores_nothing(publisher: Publisher, jobs: Jobs, job: RunningJob) -> None:
    publisher.publish(SweepEvents((SequencePrefill(job.sequence_id, 5, 9),)))

    assert jobs.events("a") == []
    assert not job.is_settled


def test_a_failed_sequence_keeps_its_code(publisher: Publisher, jobs: Jobs, job: RunningJob) -> None:
    publisher.publish(SweepEvents((finished(job, FinishReason.ERROR, "not_finite", "it overflows"),)))

    (event,) = jobs.events("a")
    assert (event.type, event.code, event.message) == ("failed", "not_finite", "it overflows")


def test_a_failed_sweep_ends_the_attempt_and_not_the_job(publisher: Publisher, jobs: Jobs, job: RunningJob) -> None:
    publisher.publish(SweepEvents((finished(job, FinishReason.ERROR, "engine", "boom"),)))

    assert jobs.events("a") == []
    assert job.wait(0) is Outcome.ATTEMPT_FAILED


@pytest.mark.parametrize(("was_asked", "outcome"), [(True, Outcome.ENDED), (False, Outcome.GIVEN_BACK)])
def test_a_cancelled_sequence_ends_the_job_only_if_a_client_asked(
    publisher: Publisher, jobs: Jobs, job: RunningJob, was_asked: bool, outcome: Outcome
) -> None:
    if was_asked:
        job.request_cancel()

    publisher.publish(SweepEvents((finished(job, FinishReason.CANCELLED),)))

    assert job.wait(0) is outcome
    assert [event.type for event in jobs.events("a")] == (["cancelled"] if was_asked else [])


def test_events_of_sequences_that_are_not_ours_any_more_are_dropped(
    publisher: Publisher, jobs: Jobs, job: RunningJob
) -> None:
    job.settle(Outcome.GIVEN_BACK)

    publisher.publish(
        SweepEvents((SequenceTokens(job.sequence_id, 0, (7,), "x"), SequenceTokens("gone.1", 0, (7,), "x")))
    )

    assert jobs.events("a") == []


def test_an_engine_whose_events_break_is_reported(
    registry: Registry, table: JobTable, ended: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    engine = BrokenEngine()
    delivery = Delivery(registry, 5.0, engine.cancel, threading.Event())
    publisher = Publisher(engine, table, delivery, ended.append)

    publisher.start()

    assert publisher.join(40)
    assert ended == [True]
    assert "the publisher failed" in caplog.text
    engine.close()


def test_an_engine_that_is_closed_ends_the_thread_quietly(
    publisher: Publisher, ended: list[bool], make_bench: Callable[..., object]
) -> None:
    publisher.start()

    publisher._engine.close()

    wait_until(lambda: ended == [False])
    assert publisher.join(40)
