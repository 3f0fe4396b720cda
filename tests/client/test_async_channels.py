"""One connection for all streams of an asyncio client: shared, lost, idle, silent, too slow."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis

from lamella import AsyncClient
from lamella.async_channels import MAX_TEXT_CHARS, MAX_TEXTS, AsyncChannels, Inbox
from lamella.connection import async_redis
from lamella.embedded import EmbeddedServer
from lamella.keys import Keys
from tests.client.acting_worker import ActingWorker, done, token
from tests.waiting import wait_until

KEYS = Keys()
WAIT_S = 40.0


@pytest.fixture
async def client(embedded_server: EmbeddedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(embedded_server.url, heal_s=20.0) as client:
        yield client


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_until, condition)


def subscriptions(server: redis.Redis) -> list[int]:
    return [int(each["sub"]) for each in server.client_list(_type="pubsub")]


async def test_all_streams_are_subscribed_over_one_connection(
    client: AsyncClient, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    jobs = [await client.submit(str(number)) for number in range(12)]
    results = [asyncio.create_task(job.result(timeout_s=WAIT_S)) for job in jobs]

    await until(lambda: subscriptions(embedded_redis) == [12])
    for number, job in enumerate(jobs):
        worker.run(job.id, f"<{number}", ">")

    assert [result.text for result in await asyncio.gather(*results)] == [f"<{number}>" for number in range(12)]
    await until(lambda: subscriptions(embedded_redis) in ([], [0]))


async def test_streams_whose_connection_is_cut_lose_and_repeat_nothing(
    client: AsyncClient, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    jobs = [await client.submit(str(number)) for number in range(5)]

    async def seqs(job_id: str) -> list[int | None]:
        return [item.seq async for item in client.job(job_id).stream(timeout_s=WAIT_S)]

    reading = [asyncio.create_task(seqs(job.id)) for job in jobs]
    for job in jobs:
        worker.claim(job.id)
    for _ in range(8):
        for job in jobs:
            worker.emit(job.id, token("x"))
        await until(lambda: subscriptions(embedded_redis) == [5])
        embedded_redis.client_kill_filter(_type="pubsub")
    for job in jobs:
        worker.emit(job.id, token("x"), done(9))

    assert await asyncio.gather(*reading) == [list(range(1, 11))] * 5


async def test_a_stream_that_ends_early_leaves_the_other_one_of_its_job(
    client: AsyncClient, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    job = await client.submit("x")
    worker.claim(job.id)
    whole = asyncio.create_task(job.result(timeout_s=WAIT_S))
    early = job.stream(timeout_s=WAIT_S)
    first = asyncio.ensure_future(anext(early))
    await until(lambda: embedded_redis.pubsub_numsub(KEYS.channel(job.id))[0][1] == 1)

    worker.emit(job.id, token("a"))
    assert (await first).seq == 1
    await early.aclose()
    worker.emit(job.id, token("b"), done(2))

    assert (await whole).text == "ab"


async def test_a_stream_that_is_cancelled_while_it_begins_breaks_no_other(
    client: AsyncClient, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    job = await client.submit("x")
    worker.claim(job.id)
    whole = asyncio.create_task(job.result(timeout_s=WAIT_S))
    await until(lambda: subscriptions(embedded_redis) == [1])

    for _ in range(30):
        stream = client.job(job.id).stream(timeout_s=WAIT_S)
        beginning = asyncio.ensure_future(anext(stream))
        await asyncio.wait({beginning}, timeout=0.0)
        beginning.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beginning
    worker.emit(job.id, token("a"), done())

    assert (await whole).text == "a"


async def test_an_idle_connection_is_given_back_and_the_next_stream_opens_another(
    embedded_server: EmbeddedServer, embedded_redis: redis.Redis
) -> None:
    server = async_redis(embedded_server.url, 5.0)
    channels = AsyncChannels(server.connection_pool, look_s=0.05)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.aclose)
        stack.push_async_callback(channels.close)
        inbox = await channels.follow("news")

        channels.leave(inbox)
        await until(lambda: not subscriptions(embedded_redis))
        again = await channels.follow("news")
        embedded_redis.publish("news", "hello")

        assert await again.take(WAIT_S) == ["hello"]


async def test_a_connection_that_answers_nothing_more_is_lost(tmp_path: Path) -> None:
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        is_mute = False
        while text := await reader.read(10_000):
            if b"SUBSCRIBE" in text and not is_mute:
                writer.write(b"*3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n")
                is_mute = True
            elif not is_mute:
                writer.write((b"+PONG\r\n" if b"PING" in text else b"+OK\r\n") * text.count(b"*"))
        writer.close()

    path = tmp_path / "mute.sock"
    async with await asyncio.start_unix_server(answer, path) as mute:
        server = async_redis(f"unix://{path}", 5.0)
        channels = AsyncChannels(server.connection_pool, look_s=0.02)
        inbox = await channels.follow("news")

        with pytest.raises(redis.ConnectionError):
            await inbox.take(WAIT_S)
        await channels.follow("news")

        assert connections == 2
        await channels.close()
        await server.aclose()
        mute.close()


async def test_an_inbox_gives_what_came_and_then_waits() -> None:
    inbox = Inbox("news")
    inbox.put("a")
    inbox.put("b")

    assert await inbox.take(WAIT_S) == ["a", "b"]
    assert await inbox.take(0.01) == []
    asyncio.get_running_loop().call_later(0.01, inbox.put, "c")
    assert await inbox.take(WAIT_S) == ["c"]


@pytest.mark.parametrize(("count", "chars"), [(MAX_TEXTS + 1, 1), (3, MAX_TEXT_CHARS // 2)])
async def test_an_inbox_that_nobody_empties_drops_all_and_says_so(count: int, chars: int) -> None:
    inbox = Inbox("news")
    for _ in range(count):
        inbox.put("x" * chars)

    assert await inbox.take(WAIT_S) == []
    inbox.put("after")
    assert await inbox.take(WAIT_S) == ["after"]


async def test_a_stream_that_is_read_late_has_every_event(
    client: AsyncClient, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    job = await client.submit("x", max_tokens=5000)
    worker.claim(job.id)
    stream = job.stream(timeout_s=WAIT_S)
    worker.emit(job.id, token("first"))
    assert (await anext(stream)).seq == 1

    for _ in range(12):
        worker.emit(job.id, *(token("x") for _ in range(100)))
    worker.emit(job.id, done(1201))

    assert [item.seq async for item in stream] == list(range(2, 1203))
