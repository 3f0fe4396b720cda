"""Reads one job's events over an asyncio connection; parallel to `stream`, whose order and deadlines it shares."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from redis.exceptions import RedisError

from lamella.async_channels import Inbox
from lamella.connection import READER_SOCKET_TIMEOUT_S, AsyncConnection, check_seconds
from lamella.operations import check_job_id
from lamella.stream import check_after
from lamella.stream_clock import StreamClock
from lamella.stream_order import StreamItem, StreamOrder


def read_async_stream(
    connection: AsyncConnection, job_id: str, after: int, timeout_s: float, heal_s: float
) -> AsyncGenerator[StreamItem, None]:
    """Yield the job's events numbered above `after`, and its progress, up to and including the terminal event.

    Raises:
        JobNotFound: there is no record of the job.
        JobError: events that should be stored are not.
        WaitTimeout: the job has not ended within `timeout_s`.
        ServerUnreachable: the server was away for longer than `heal_s`.
        ServerRefused: the server refuses to be read.
    """
    order = StreamOrder(check_job_id(job_id), check_after(after), connection.ring)
    clock = StreamClock(job_id, connection.url, check_seconds("timeout_s", timeout_s), heal_s)
    return _items(connection, order, clock)


async def _items(
    connection: AsyncConnection, order: StreamOrder, clock: StreamClock
) -> AsyncGenerator[StreamItem, None]:
    subscription: _Subscription | None = None
    try:
        while not order.ended:
            wait_s = clock.wait_s(order.last)
            try:
                if subscription is None:
                    subscription = _Subscription(connection, order)
                items = await subscription.next_items(wait_s, clock)
            except (RedisError, OSError) as error:
                if subscription is not None:
                    subscription.close()
                    subscription = None
                connection.check_open()
                await asyncio.sleep(clock.failed(error))
                continue
            for item in items:
                yield item
    finally:
        if subscription is not None:
            subscription.close()


class _Subscription:
    """One subscription to a job's channel, with the stored events beside it."""

    def __init__(self, connection: AsyncConnection, order: StreamOrder) -> None:
        self._connection = connection
        self._redis = connection.reader()
        self._order = order
        self._inbox: Inbox | None = None

    async def next_items(self, wait_s: float, clock: StreamClock) -> list[StreamItem]:
        """Return what came within `wait_s`, if anything."""
        if self._inbox is None:
            async with asyncio.timeout(wait_s + READER_SOCKET_TIMEOUT_S):
                channel = self._connection.keys.channel(self._order.job_id)
                self._inbox = await self._connection.channels.follow(channel)
            self._order.behind = True
        if not self._order.behind and (texts := await self._inbox.take(wait_s)):
            return [item for text in texts for item in self._order.live(text)]
        async with asyncio.timeout(wait_s + READER_SOCKET_TIMEOUT_S):
            return await self._stored(clock)

    def close(self) -> None:
        """Give up the subscription."""
        if self._inbox is not None:
            self._connection.channels.leave(self._inbox)

    async def _stored(self, clock: StreamClock) -> list[StreamItem]:
        async with self._connection.stored_reads, self._redis.pipeline(transaction=True) as pipeline:
            for command in self._order.stored_commands(self._connection.keys).commands:
                pipeline.execute_command(*command)
            raw = await pipeline.execute()
        clock.answered()
        return self._order.stored(raw)
