"""Streams over a real server: late, cut off, silent, deleted."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import redis

from lamella import AsyncClient, Client
from lamella.embedded import EmbeddedServer
from lamella.errors import JobError, JobNotFound, RequestError, ServerRefused, ServerUnreachable, WaitTimeout
from lamella.job import Job
from lamella.keys import Keys
from lamella.messages import Progress
from lamella.stream_order import StreamItem
from tests.client.acting_worker import ActingWorker, done, failed, token
from tests.waiting import wait_until

KEYS = Keys()


@pytest.fixture
def client(embedded_server: EmbeddedServer) -> Iterator[Client]:
    with Client(embedded_server.url, timeout_s=5.0, heal_s=10.0) as client:
        yield client


class Follower(threading.Thread):
    """Reads a stream to its end in a thread of its own, as a user's program would."""

    def __init__(self, job: Job, after: int = 0, timeout_s: float = 20.0) -> None:
        super().__init__(name="follower", daemon=True)
        self.items: list[StreamItem] = []
        self.error: Exception | None = None
        self._stream = job.stream(after=after, timeout_s=timeout_s)
        self.start()

    def run(self) -> None:
        try:
            for item in self._stream:
                self.items.append(item)
        except Exception as error:  # noqa: BLE001 - handed to the test, which checks it
            self.error = error

    def finished(self) -> list[int | None]:
        self.join(20.0)
        assert not self.is_alive()
        return [item.seq for item in self.items]


def subscribers(client: redis.Redis, job: Job) -> int:
    return dict(client.pubsub_numsub(KEYS.channel(job.id))).get(KEYS.channel(job.id), 0)


def test_a_late_reader_gets_everything(client: Client, worker: ActingWorker) -> None:
    job = client.submit("x")
    worker.run(job.id, "a", "b", "c")

    assert [(item.seq, item.event.type) for item in job.stream(timeout_s=40)] == [
        (1, "token"),
        (2, "token"),
        (3, "token"),
        (4, "done"),
    ]


def test_a_handle_made_anew_goes_on_after_an_event(client: Client, worker: ActingWorker) -> None:
    job = client.submit("x")
    worker.run(job.id, "a", "b", "c")

    assert [item.seq for item in client.job(job.id).stream(after=2, timeout_s=40)] == [3, 4]
    assert list(client.job(job.id).stream(after=4, timeout_s=40)) == []


def test_tokens_come_while_the_job_runs(client: Client, worker: ActingWorker) -> None:
    job = client.submit("x")
    worker.claim(job.id)
    follower = Follower(job)

    worker.emit(job.id, token("a"))
    wait_until(lambda: len(follower.items) == 1)
    worker.emit(job.id, token("b"), done(2))

    assert follower.finished() == [1, 2, 3]


def test_progress_arrives_without_a_number(client: Client, worker: ActingWorker, embedded_redis: redis.Redis) -> None:
    job = client.submit("x")
    worker.claim(job.id)
    follower = Follower(job)
    wait_until(lambda: subscribers(embedded_redis, job))
    progress = Progress(prefilled_tokens=1, prompt_tokens=2)

    wait_until(lambda: embedded_redis.publish(KEYS.channel(job.id), f"- {progress.model_dump_json()}"))
    wait_until(lambda: follower.items)
    worker.emit(job.id, done())

    assert follower.finished() == [None, 1]
    assert follower.items[0].event == progress


def test_a_lost_publication_heals_by_the_next_event_and_by_silence(
    client: Client, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    job = client.submit("x")
    worker.claim(job.id)
    follower = Follower(job)
    wait_until(lambda: subscribers(embedded_redis, job))

    # Stored without being published, as if the message had been dropped on its way.
    embedded_redis.xadd(KEYS.stream(job.id), {"e": token("a").model_dump_json(exclude_none=True)}, id="1-0")
    embedded_redis.hset(KEYS.job(job.id), "seq", 1)
    worker.seqs[job.id] = 1
    worker.emit(job.id, token("b"))
    wait_until(lambda: len(follower.items) == 2)
    embedded_redis.xadd(KEYS.stream(job.id), {"e": token("c").model_dump_json(exclude_none=True)}, id="3-0")
    embedded_redis.hset(KEYS.job(job.id), "seq", 3)
    wait_until(lambda: len(follower.items) == 3)
    worker.seqs[job.id] = 3
    worker.emit(job.id, done(3))

    assert follower.finished() == [1, 2, 3, 4]


def test_duplicates_on_the_channel_are_dropped(
    client: Client, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    job = client.submit("x")
    worker.claim(job.id)
    follower = Follower(job)
    worker.emit(job.id, token("a"))
    wait_until(lambda: follower.items)

    embedded_redis.publish(KEYS.channel(job.id), f"1 {token('a').model_dump_json()}")
    worker.emit(job.id, done())

    assert follower.finished() == [1, 2]


@pytest.mark.parametrize("kind", ["pubsub", "normal"])
def test_a_cut_connection_loses_and_repeats_nothing(
    client: Client, worker: ActingWorker, embedded_redis: redis.Redis, kind: str
) -> None:
    job = client.submit("x")
    worker.claim(job.id)
    follower = Follower(job)

    for number in range(200):
        worker.emit(job.id, token(str(number)))
        if number % 20 == 10:
            wait_until(lambda: subscribers(embedded_redis, job))
            embedded_redis.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
    worker.emit(job.id, done(200))

    assert follower.finished() == list(range(1, 202))
    assert follower.error is None


async def test_an_asyncio_stream_survives_cuts_too(
    embedded_server: EmbeddedServer, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    async with AsyncClient(embedded_server.url, timeout_s=5.0, heal_s=10.0) as client:
        job = await client.submit("x")
        worker.claim(job.id)
        worker.emit(job.id, token("first"))
        seen = []

        async for item in job.stream(timeout_s=20):
            seen.append(item.seq)
            if len(seen) % 10 == 0:
                embedded_redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            if len(seen) < 50:
                worker.emit(job.id, token("x"))
            elif len(seen) == 50:
                worker.emit(job.id, done(50))

    assert seen == list(range(1, 52))


def test_the_deadline_holds_while_the_job_waits(client: Client, worker: ActingWorker) -> None:
    job = client.submit("x")
    started = time.monotonic()

    with pytest.raises(WaitTimeout, match=f"{job.id}.*goes on"):
        job.result(timeout_s=0.5)

    assert 0.4 < time.monotonic() - started < 20.0


def test_the_deadline_holds_while_the_server_is_silent(own_server: EmbeddedServer) -> None:
    with Client(own_server.url, timeout_s=3.0) as client:
        job = client.submit("x", model="m", require_worker=False)
        assert own_server.pid is not None
        os.kill(own_server.pid, signal.SIGSTOP)
        started = time.monotonic()
        try:
            with pytest.raises(WaitTimeout):
                job.result(timeout_s=1.0)
            assert time.monotonic() - started < 20.0
            with pytest.raises(ServerUnreachable, match="no answer"):
                job.status()
            assert time.monotonic() - started < 40.0
        finally:
            os.kill(own_server.pid, signal.SIGCONT)


async def test_the_asyncio_deadline_holds_while_the_server_is_silent(own_server: EmbeddedServer) -> None:
    async with AsyncClient(own_server.url, timeout_s=3.0) as client:
        job = await client.submit("x", model="m", require_worker=False)
        assert own_server.pid is not None
        os.kill(own_server.pid, signal.SIGSTOP)
        started = time.monotonic()
        try:
            with pytest.raises(WaitTimeout):
                await job.result(timeout_s=1.0)
            assert time.monotonic() - started < 20.0
        finally:
            os.kill(own_server.pid, signal.SIGCONT)


def test_a_server_that_stays_away_is_unreachable(own_server: EmbeddedServer) -> None:
    with Client(own_server.url, heal_s=0.5) as client:
        job = client.submit("x", model="m", require_worker=False)
        follower = Follower(job)
        own_server.stop()

        follower.finished()

    assert isinstance(follower.error, ServerUnreachable)
    assert "lamella up" in str(follower.error)


def test_a_stream_survives_a_restart_of_the_server(own_server: EmbeddedServer) -> None:
    with (
        Client(own_server.url, heal_s=15.0) as client,
        redis.Redis.from_url(own_server.url, protocol=2, decode_responses=True) as link,
    ):
        worker = ActingWorker(link)
        job = client.submit("x", model=worker.model, require_worker=False)
        worker.claim(job.id)
        follower = Follower(job)
        worker.emit(job.id, token("a"))
        wait_until(lambda: follower.items)

        own_server.stop()
        own_server.start()
        worker.emit(job.id, token("b"), done(2))

        assert follower.finished() == [1, 2, 3]
        assert follower.error is None


def test_lost_data_is_an_error_and_no_hang(client: Client, worker: ActingWorker, embedded_redis: redis.Redis) -> None:
    job = client.submit("x")
    worker.claim(job.id)
    worker.emit(job.id, token("a"))
    follower = Follower(job)
    wait_until(lambda: follower.items)

    embedded_redis.flushall()

    follower.finished()
    assert isinstance(follower.error, JobNotFound)


def test_a_result_whose_tokens_are_gone_is_an_error(
    client: Client, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    job = client.submit("x")
    worker.run(job.id, "a", "b")
    embedded_redis.delete(KEYS.stream(job.id))

    assert [item.seq for item in job.stream(timeout_s=40)] == [3]
    with pytest.raises(JobError, match="no longer stored"):
        job.result(timeout_s=40)


def test_failed_without_its_stream_still_tells_why(
    client: Client, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    job = client.submit("x")
    worker.claim(job.id)
    worker.emit(job.id, token("a"), failed())
    embedded_redis.delete(KEYS.stream(job.id))

    with pytest.raises(JobError, match="prompt_too_long"):
        job.result(timeout_s=40)


def test_a_long_stream_is_read_in_pages(client: Client, worker: ActingWorker) -> None:
    job = client.submit("x")
    worker.claim(job.id)
    for _ in range(5):
        worker.emit(job.id, *(token("x") for _ in range(500)))
    worker.emit(job.id, done(2500))

    assert [item.seq for item in job.stream(timeout_s=40)] == list(range(1, 2502))


def test_an_unknown_job_is_not_found(client: Client) -> None:
    with pytest.raises(JobNotFound, match="nobody"):
        list(client.job("nobody").stream(timeout_s=40))


@pytest.mark.parametrize("after", [-1, "3", None, True, 2**63])
def test_a_place_that_is_no_event_number_is_refused(client: Client, after: int) -> None:
    with pytest.raises(RequestError, match="after is"):
        client.job("j").stream(after=after)


@pytest.mark.parametrize("timeout_s", [0, -1, None, "5", float("inf"), float("nan")])
def test_a_wait_without_an_end_is_refused(client: Client, timeout_s: float) -> None:
    with pytest.raises(RequestError, match="timeout_s is"):
        client.job("j").result(timeout_s=timeout_s)


def test_a_refusal_ends_the_stream_at_once(own_server: EmbeddedServer) -> None:
    with (
        Client(own_server.url, heal_s=15.0) as client,
        redis.Redis.from_url(own_server.url, protocol=2, decode_responses=True) as link,
    ):
        job = client.submit("x", model="m", require_worker=False)
        follower = Follower(job)
        wait_until(lambda: subscribers(link, job))
        link.config_set("requirepass", "geheim")
        link.execute_command("AUTH", "geheim")
        link.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        link.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        follower.finished()

    assert isinstance(follower.error, ServerRefused)
    assert "password" in str(follower.error)


def test_an_abandoned_stream_gives_its_subscription_back(
    client: Client, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    job = client.submit("x")
    worker.claim(job.id)
    worker.emit(job.id, token("a"), token("b"))
    stream = job.stream(timeout_s=40)
    next(stream)

    stream.close()

    wait_until(lambda: subscribers(embedded_redis, job) == 0)
