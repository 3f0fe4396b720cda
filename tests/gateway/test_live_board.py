"""One subscription for all streams: many at once, a lost connection, a reader that is too slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis

from lamella.client import Client
from lamella.connection import AsyncConnection
from lamella.embedded import EmbeddedServer
from lamella.errors import JobNotFound
from lamella.stream_order import StreamItem
from lamella_gateway.follower import MOST_BUFFERED, Follower
from lamella_gateway.live_board import LiveBoard
from tests.client.acting_worker import MODEL, ActingWorker, done, token


@pytest.fixture
async def board(embedded_server: EmbeddedServer) -> AsyncIterator[LiveBoard]:
    connection = AsyncConnection(embedded_server.url, "lamella:", 10.0)
    board = LiveBoard(connection)
    board.start()
    yield board
    await board.close()
    await connection.close()


def submitted(embedded_server: EmbeddedServer, count: int = 1) -> list[str]:
    with Client(embedded_server.url) as client:
        return [client.submit("x", model=MODEL, require_worker=False).id for _ in range(count)]


async def all_of(follower: Follower) -> list[StreamItem]:
    found: list[StreamItem] = []
    async with asyncio.timeout(40):
        while items := await follower.next_items():
            found += items
    return found


async def test_many_jobs_are_followed_at_once_each_event_once(
    board: LiveBoard, embedded_server: EmbeddedServer, worker: ActingWorker
) -> None:
    ids = submitted(embedded_server, 20)
    tasks = [asyncio.create_task(all_of(await board.follow(job_id))) for job_id in ids]

    for job_id in ids:
        worker.claim(job_id)
    for _ in range(5):
        for job_id in ids:
            await asyncio.to_thread(worker.emit, job_id, token(job_id))
    for job_id in ids:
        worker.emit(job_id, done(5))

    for items in await asyncio.gather(*tasks):
        assert [item.seq for item in items] == [1, 2, 3, 4, 5, 6]


async def test_nothing_is_lost_when_the_subscription_is_cut(
    board: LiveBoard, embedded_server: EmbeddedServer, embedded_redis: redis.Redis, worker: ActingWorker
) -> None:
    (job_id,) = submitted(embedded_server)
    worker.claim(job_id)
    follower = await board.follow(job_id)
    task = asyncio.create_task(all_of(follower))

    for number in range(30):
        await asyncio.to_thread(worker.emit, job_id, token(str(number)))
        if number % 7 == 3:
            await asyncio.to_thread(embedded_redis.client_kill_filter, _type="pubsub")
    worker.emit(job_id, done(30))

    assert [item.seq for item in await task] == list(range(1, 32))


async def test_a_reader_that_is_too_slow_reads_the_store(
    board: LiveBoard, embedded_server: EmbeddedServer, worker: ActingWorker
) -> None:
    (job_id,) = submitted(embedded_server)
    worker.claim(job_id)
    follower = await board.follow(job_id)
    worker.emit(job_id, token("first"))
    async with asyncio.timeout(40):
        first = await follower.next_items()

    many = 3 * MOST_BUFFERED
    for number in range(0, many, 8):  # published while nobody takes it
        await asyncio.to_thread(worker.emit, job_id, *(token(str(each)) for each in range(number, number + 8)))
    worker.emit(job_id, done(many))

    items = [*first, *await all_of(follower)]
    assert [item.seq for item in items] == list(range(1, many + 3))


async def test_two_may_follow_one_job(board: LiveBoard, embedded_server: EmbeddedServer, worker: ActingWorker) -> None:
    (job_id,) = submitted(embedded_server)
    early, late = await board.follow(job_id), await board.follow(job_id, after=1)
    worker.run(job_id, "a", "b")

    assert [item.seq for item in await all_of(early)] == [1, 2, 3]
    await board.leave(early)
    await board.leave(early)
    assert [item.seq for item in await all_of(late)] == [2, 3]


async def test_a_job_that_is_not_there_is_said(board: LiveBoard) -> None:
    follower = await board.follow("0" * 32)

    with pytest.raises(JobNotFound):
        await all_of(follower)
