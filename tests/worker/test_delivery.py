"""Delivery: every event reaches the stream exactly once, whatever Redis does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest
import redis

from lamella.keys import Keys
from lamella.messages import Done, JobState, Progress, TokenEvent, Usage
from lamella.registry_calls import cancel_call, claim_call, release_call
from lamella_worker.delivery import Delivery, Emission
from lamella_worker.registry import Registry, RegistryAway
from lamella_worker.running_job import Outcome, RunningJob
from tests.waiting import wait_until
from tests.worker.conftest import Jobs

DONE = Done(finish_reason="length", usage=Usage(prompt_tokens=1, completion_tokens=2))


def token(token_id: int) -> TokenEvent:
    return TokenEvent(token_ids=(token_id,), text=f"{token_id} ")


class ForgetfulRedis(fakeredis.FakeRedis):
    """A server whose connection breaks right after it did what a pipeline asked; `breaks` times."""

    breaks = 0

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Any:
        pipe = super().pipeline(transaction, shard_hint)
        run = pipe.execute

        def execute(raise_on_error: bool = True) -> Any:
            answers = run(raise_on_error)
            if self.breaks:
                self.breaks -= 1
                raise redis.ConnectionError("the answer was lost")
            return answers

        pipe.execute = execute
        return pipe


@pytest.fixture
def forgetful(fake_server: fakeredis.FakeServer) -> ForgetfulRedis:
    return ForgetfulRedis(server=fake_server, protocol=2, decode_responses=True)


@pytest.fixture
def cancelled() -> list[str]:
    return []


@pytest.fixture
def gave_up() -> threading.Event:
    return threading.Event()


@pytest.fixture
def delivery(registry: Registry, cancelled: list[str], gave_up: threading.Event) -> Delivery:
    return Delivery(registry, 5.0, cancelled.append, gave_up)


@pytest.fixture
def running(registry: Registry, jobs: Jobs) -> Callable[[str], RunningJob]:
    def claim(job_id: str) -> RunningJob:
        jobs.submit(job_id)
        reply = registry.call(claim_call(registry.keys, job_id, "w1", 5000, 3))
        return RunningJob(job_id, reply.fence, reply.seq + 1, reply.attempts)

    return claim


def test_all_jobs_of_a_sweep_are_stored_and_the_last_word_settles(
    delivery: Delivery, jobs: Jobs, running: Callable[[str], RunningJob]
) -> None:
    a, b = running("a"), running("b")

    delivery.deliver([Emission(a, (token(1),)), Emission(b, (token(2), DONE), Outcome.ENDED)])

    assert jobs.events("a") == [token(1)]
    assert jobs.events("b") == [token(2), DONE]
    assert jobs.state("b") is JobState.DONE
    assert (a.wait(0), b.wait(0)) == (None, Outcome.ENDED)


def test_events_wait_while_redis_is_away_and_none_is_dropped(
    delivery: Delivery, jobs: Jobs, running: Callable[[str], RunningJob], fake_server: fakeredis.FakeServer
) -> None:
    a = running("a")
    fake_server.connected = False
    sender = threading.Thread(target=delivery.deliver, args=([Emission(a, (token(1), token(2)))],), daemon=True)
    sender.start()

    wait_until(sender.is_alive)
    fake_server.connected = True
    sender.join(40)

    assert not sender.is_alive()
    assert jobs.events("a") == [token(1), token(2)]


@pytest.mark.parametrize("breaks", [1, 3])
def test_an_emit_whose_answer_was_lost_is_stored_once(
    forgetful: ForgetfulRedis, jobs: Jobs, running: Callable[[str], RunningJob], keys: Keys, breaks: int
) -> None:
    a = running("a")
    delivery = Delivery(Registry(forgetful, keys), 5.0, lambda sequence_id: None, threading.Event())
    delivery.deliver([Emission(a, (token(1),))])
    forgetful.breaks = breaks

    delivery.deliver([Emission(a, (token(2), token(3), DONE), Outcome.ENDED)])

    assert jobs.events("a") == [token(1), token(2), token(3), DONE]
    assert a.wait(0) is Outcome.ENDED


def test_a_process_that_gives_up_gives_its_jobs_back(
    delivery: Delivery,
    gave_up: threading.Event,
    running: Callable[[str], RunningJob],
    fake_server: fakeredis.FakeServer,
) -> None:
    a = running("a")
    fake_server.connected = False
    gave_up.set()

    delivery.deliver([Emission(a, (token(1),))])

    assert a.wait(0) is Outcome.GIVEN_BACK


def test_a_cancel_reaches_the_engine_once(
    delivery: Delivery, registry: Registry, running: Callable[[str], RunningJob], cancelled: list[str]
) -> None:
    a = running("a")
    registry.call(cancel_call(registry.keys, "a"))

    delivery.deliver([Emission(a, (token(1),))])
    delivery.deliver([Emission(a, (token(2),))])
    delivery.renew([a])

    assert cancelled == [a.sequence_id]
    assert a.is_cancel_requested
    assert not a.is_settled


def test_a_fenced_job_is_lost_and_its_sequence_cancelled(
    delivery: Delivery,
    jobs: Jobs,
    registry: Registry,
    running: Callable[[str], RunningJob],
    cancelled: list[str],
) -> None:
    a = running("a")
    registry.call(release_call(registry.keys, "a", a.fence, True))
    registry.call(claim_call(registry.keys, "a", "w2", 5000, 3))

    delivery.deliver([Emission(a, (token(1), DONE), Outcome.ENDED)])

    assert a.wait(0) is Outcome.LOST
    assert cancelled == [a.sequence_id]
    assert jobs.events("a") == []


def test_a_job_whose_record_is_gone_is_lost(
    delivery: Delivery, running: Callable[[str], RunningJob], fake_redis: redis.Redis, cancelled: list[str]
) -> None:
    a, b = running("a"), running("b")
    fake_redis.flushall()

    delivery.deliver([Emission(a, (token(1),))])
    delivery.renew([b])

    assert (a.wait(0), b.wait(0)) == (Outcome.LOST, Outcome.LOST)
    assert cancelled == [a.sequence_id, b.sequence_id]


def test_a_job_that_redis_remembers_less_of_is_given_back(
    delivery: Delivery, running: Callable[[str], RunningJob], fake_redis: redis.Redis, keys: Keys
) -> None:
    a = running("a")
    delivery.deliver([Emission(a, (token(1), token(2)))])
    fake_redis.hset(keys.job("a"), "seq", 1)
    fake_redis.xdel(keys.stream("a"), "2-0")

    delivery.deliver([Emission(a, (token(3),))])

    assert a.wait(0) is Outcome.GIVEN_BACK


def test_a_job_that_redis_refuses_for_good_does_not_hold_up_the_others(
    delivery: Delivery, jobs: Jobs, running: Callable[[str], RunningJob], fake_redis: redis.Redis, keys: Keys
) -> None:
    a, b = running("a"), running("b")
    fake_redis.delete(keys.stream("a"))
    fake_redis.set(keys.stream("a"), "not a stream")

    delivery.deliver([Emission(a, (token(1),)), Emission(b, (token(2),))])

    assert a.wait(0) is Outcome.LOST
    assert jobs.events("b") == [token(2)]


def test_progress_is_published_and_not_stored(
    delivery: Delivery, jobs: Jobs, running: Callable[[str], RunningJob], fake_redis: redis.Redis, keys: Keys
) -> None:
    a = running("a")
    listener = fake_redis.pubsub(ignore_subscribe_messages=True)
    listener.subscribe(keys.channel("a"))
    listener.get_message(timeout=1)

    delivery.deliver([Emission(a, progress=Progress(prefilled_tokens=3, prompt_tokens=9))])

    message = wait_until(lambda: listener.get_message(timeout=1))
    assert message["data"] == '- {"type":"progress","prefilled_tokens":3,"prompt_tokens":9}'
    assert jobs.events("a") == []
    listener.close()


def test_renewing_extends_the_lease_and_says_when_it_cannot(
    delivery: Delivery,
    jobs: Jobs,
    running: Callable[[str], RunningJob],
    fake_redis: redis.Redis,
    fake_server: fakeredis.FakeServer,
    keys: Keys,
) -> None:
    a = running("a")
    fake_redis.hset(keys.job("a"), "lease_until", 1)

    delivery.renew([a])

    assert int(jobs.record("a")["lease_until"]) > 1
    fake_server.connected = False
    with pytest.raises(RegistryAway):
        delivery.renew([a])
    fake_server.connected = True
