"""Reads one job's events over a synchronous connection: subscribe, read what is stored, then live; heal what breaks.

Owns the reader's connections and nothing of the order (`stream_order`) or the deadlines (`stream_clock`). A lost
connection is replaced and the stored events fill the gap, so the stream goes on without loss or duplicates.
"""

from __future__ import annotations

import time
from collections.abc import Generator

import redis
from redis.exceptions import RedisError

from lamella.connection import Connection, check_seconds
from lamella.errors import RequestError
from lamella.operations import check_job_id
from lamella.stream_clock import StreamClock
from lamella.stream_order import StreamItem, StreamOrder


def read_stream(
    connection: Connection, job_id: str, after: int, timeout_s: float, heal_s: float
) -> Generator[StreamItem, None, None]:
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


def check_after(after: object) -> int:
    """Return `after` if it is an event number.

    Raises:
        RequestError: it is not a whole number from 0 on.
    """
    if isinstance(after, bool) or not isinstance(after, int) or not 0 <= after < 2**63:
        raise RequestError(f"after is {after!r}; use the number of the last event seen, or 0 for all")
    return after


def _items(connection: Connection, order: StreamOrder, clock: StreamClock) -> Generator[StreamItem, None, None]:
    subscription: _Subscription | None = None
    try:
        while not order.ended:
            wait_s = clock.wait_s(order.last)
            try:
                if subscription is None:
                    subscription = _Subscription(connection, order)
                items = subscription.next_items(wait_s, clock)
            except (RedisError, OSError) as error:
                if subscription is not None:
                    subscription.close()
                    subscription = None
                connection.check_open()
                time.sleep(clock.failed(error))
                continue
            yield from items
    finally:
        if subscription is not None:
            subscription.close()


class _Subscription:
    """One subscription to a job's channel, with the stored events beside it."""

    def __init__(self, connection: Connection, order: StreamOrder) -> None:
        self._redis = connection.reader()
        self._keys = connection.keys
        self._order = order
        self._confirmed = False
        self._pubsub = self._redis.pubsub()  # type: ignore[no-untyped-call]  # redis-py leaves it bare

    def next_items(self, wait_s: float, clock: StreamClock) -> list[StreamItem]:
        """Return what came within `wait_s`, if anything."""
        if not self._confirmed:
            self._subscribe(wait_s)
            self._order.behind = True
        if self._order.behind:
            return self._stored(clock)
        message = self._pubsub.get_message(timeout=wait_s)
        if message is None:
            return self._stored(clock)
        if message["type"] != "message":
            return []
        return self._order.live(str(message["data"]))

    def close(self) -> None:
        """Give up the subscription."""
        self._pubsub.close()

    def _subscribe(self, wait_s: float) -> None:
        self._pubsub.subscribe(self._keys.channel(self._order.job_id))
        message = self._pubsub.get_message(timeout=wait_s)
        if message is None or message["type"] != "subscribe":
            raise redis.TimeoutError("the subscription was not confirmed")
        self._confirmed = True

    def _stored(self, clock: StreamClock) -> list[StreamItem]:
        with self._redis.pipeline(transaction=True) as pipeline:
            for command in self._order.stored_commands(self._keys).commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py leaves it bare
            raw = pipeline.execute()
        clock.answered()
        return self._order.stored(raw)
