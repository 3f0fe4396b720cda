"""One connection for the published events of all streams of an asyncio client.

Owns the connection that is subscribed, the task that reads it, and an inbox for each stream; nothing of what messages
mean. The connection is opened with the first stream and closed some seconds after the last. When it is lost every
inbox says so once, and each stream follows its channel again by its own clock. Neighbours: `async_stream`, whose
streams follow channels here, and `connection`, which closes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

import redis
import redis.asyncio
from redis.exceptions import RedisError, ResponseError

LOOK_S = 5.0
QUIET_LOOKS = 3  # so many of them without a word, and the server is asked for one; no answer by the next: it is lost
ANSWER_S = 2.0  # for the server to confirm a subscription
END_S = 2.0  # for the tasks to end, which wait for nothing
MAX_TEXTS = 1000  # in an inbox; what is beyond that is read from what is stored
MAX_TEXT_CHARS = 4_000_000
TURN = 16  # messages that are handed out before streams get to run


class Inbox:
    """What came on a channel for one stream; put into by the reader, taken from by the stream."""

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self._texts: list[str] = []
        self._chars = 0
        self._has_overflowed = False
        self._error: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._wake_at = 0.0
        self._clock: asyncio.TimerHandle | None = None  # outlives a wait: most end by a message, and the next is longer

    def put(self, text: str) -> None:
        """Take in a message; where a stream is too slow for them, all are dropped, because they are stored."""
        self._chars += len(text)
        if self._has_overflowed or len(self._texts) >= MAX_TEXTS or self._chars > MAX_TEXT_CHARS:
            self._has_overflowed = True
            self._texts.clear()
            self._chars = 0
        else:
            self._texts.append(text)
        self._wake()

    def lose(self, why: str) -> None:
        """Nothing more will come."""
        self._error = why
        self._wake()

    async def take(self, wait_s: float) -> list[str]:
        """Return what has come, waiting up to `wait_s` for the first; empty after silence, or where some was dropped.

        Raises:
            ConnectionError: (redis) the connection is lost.
        """
        if not self._texts and self._error is None and not self._has_overflowed:
            self._waiter = self._silence(wait_s)
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            raise redis.ConnectionError(self._error)
        texts, self._texts, self._chars, self._has_overflowed = self._texts, [], 0, False
        return texts

    def close(self) -> None:
        """Nobody takes from here any more."""
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _silence(self, wait_s: float) -> asyncio.Future[None]:
        """Return what is woken after `wait_s` without a message."""
        loop = asyncio.get_running_loop()
        self._wake_at = loop.time() + wait_s
        if self._clock is None or self._clock.when() > self._wake_at:
            self.close()
            self._clock = loop.call_at(self._wake_at, self._look, loop)
        return loop.create_future()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._clock = None
        if self._waiter is None:
            return
        if loop.time() >= self._wake_at:
            self._wake()
        else:
            self._clock = loop.call_at(self._wake_at, self._look, loop)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncChannels:
    """Follows channels over one connection of a pool; for use within one event loop.

    Args:
        pool: where the connection comes from, and goes back to when no stream wants it any more.
        look_s: how often it is looked whether the connection is still wanted, and still answers.
    """

    def __init__(self, pool: redis.asyncio.ConnectionPool, look_s: float = LOOK_S) -> None:
        self._pool = pool
        self._look_s = look_s
        self._opening = asyncio.Lock()
        self._link: _Link | None = None

    async def follow(self, channel: str) -> Inbox:
        """Subscribe to a channel; what is published from now on comes into the inbox. `leave` belongs to it.

        The caller bounds how long the server may take to be reached.

        Raises:
            RedisError, OSError: the server does not answer, or refuses.
        """
        async with self._opening:
            if self._link is None or not self._link.is_open:
                connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py leaves it bare
                self._link = _Link(self._pool, connection, self._look_s)
            link = self._link
        return await link.follow(channel)

    def leave(self, inbox: Inbox) -> None:
        """Follow no more; never waits, and is harmless when repeated."""
        if self._link is not None:
            self._link.leave(inbox)

    async def close(self) -> None:
        """Close the connection; harmless when repeated."""
        if self._link is not None:
            await self._link.close()


class _Link:
    """One connection from its first subscription to its end; it never connects twice."""

    def __init__(self, pool: redis.asyncio.ConnectionPool, connection: redis.asyncio.Connection, look_s: float) -> None:
        self._pool = pool
        self._look_s = look_s
        self._connection = connection
        self._inboxes: dict[str, set[Inbox]] = {}
        self._asked: deque[asyncio.Future[None]] = deque()  # the server answers in the order of questions
        self._lost: str | None = None
        self._has_heard = True
        self._quiet_looks = 0
        self._reader = asyncio.create_task(self._read(), name="lamella-channels-reader")
        self._keeper = asyncio.create_task(self._keep(), name="lamella-channels")

    @property
    def is_open(self) -> bool:
        """Whether channels can be followed here."""
        return self._lost is None and self._connection.is_connected

    async def follow(self, channel: str) -> Inbox:
        """Return an inbox once the server has confirmed it; raises as `AsyncChannels.follow`."""
        inbox = Inbox(channel)
        self._inboxes.setdefault(channel, set()).add(inbox)
        try:
            await asyncio.shield(self._asking("SUBSCRIBE", channel))
        except BaseException:
            self.leave(inbox)
            raise
        return inbox

    def leave(self, inbox: Inbox) -> None:
        """Drop an inbox, and the subscription with the last one of its channel."""
        inbox.close()
        others = self._inboxes.get(inbox.channel, set())
        if inbox not in others:
            return
        others.discard(inbox)
        if not others:
            del self._inboxes[inbox.channel]
            if self.is_open:
                self._asking("UNSUBSCRIBE", inbox.channel)

    async def close(self) -> None:
        """End the connection."""
        self._keeper.cancel()
        await asyncio.wait({self._keeper}, timeout=END_S)

    def _asking(self, *command: str) -> asyncio.Task[None]:
        """Ask in a task of its own: a stream that is cancelled must not break a command that is half sent."""
        task = asyncio.create_task(self._ask(*command))
        task.add_done_callback(_forget)
        return task

    async def _ask(self, *command: str) -> None:
        if not self.is_open:  # redis-py would connect again by itself, without the other channels
            raise redis.ConnectionError(self._lost or "the subscriptions' connection is lost")
        answered = asyncio.get_running_loop().create_future()
        self._asked.append(answered)
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._connection.send_command(*command, check_health=False)
                await answered
        except (redis.ConnectionError, OSError) as error:  # asyncio's TimeoutError is an OSError
            self._lose(str(error) or f"the server has not answered within {ANSWER_S:g} s")
            raise

    async def _read(self) -> None:
        taken = 0
        try:
            while True:
                try:
                    self._hear(await self._connection.read_response(disconnect_on_error=False))
                except ResponseError as error:
                    self._answer(error)
                taken += 1
                if taken % TURN == 0:
                    await asyncio.sleep(0)
        except (RedisError, OSError) as error:
            self._lose(str(error))

    def _hear(self, response: object) -> None:
        self._has_heard = True
        if isinstance(response, list) and len(response) == 3 and response[0] == "message":
            for inbox in self._inboxes.get(response[1], ()):
                inbox.put(response[2])
        else:
            self._answer(None)

    def _answer(self, error: ResponseError | None) -> None:
        answered = self._asked.popleft() if self._asked else None
        if answered is None or answered.done():
            return
        if error is None:
            answered.set_result(None)
        else:
            answered.set_exception(error)

    async def _keep(self) -> None:
        try:
            while not self._reader.done() and self._is_wanted():
                await asyncio.wait({self._reader}, timeout=self._look_s)
        finally:
            self._lose("the connection for the streams is closed")
            self._reader.cancel()
            await asyncio.wait({self._reader}, timeout=END_S)
            with contextlib.suppress(RedisError, OSError):
                await self._connection.disconnect(nowait=True)
            await self._pool.release(self._connection)

    def _is_wanted(self) -> bool:
        """Whether the connection is used, and answers; asks the server where it has been silent."""
        if not self._has_heard:
            self._quiet_looks += 1
            if not self._inboxes or self._quiet_looks > QUIET_LOOKS:
                return False
            if self._quiet_looks == QUIET_LOOKS:  # an answer is something heard
                self._asking("PING")
            return True
        self._has_heard, self._quiet_looks = False, 0
        return True

    def _lose(self, why: str) -> None:
        if self._lost is not None:
            return
        self._lost = why
        self._reader.cancel()
        for inbox in [inbox for each in self._inboxes.values() for inbox in each]:
            inbox.lose(why)
        self._inboxes.clear()
        while self._asked:
            self._answer_lost(self._asked.popleft(), why)

    def _answer_lost(self, answered: asyncio.Future[None], why: str) -> None:
        if not answered.done():
            answered.set_exception(redis.ConnectionError(why))


def _forget(task: asyncio.Task[None]) -> None:
    """Look at the failure of a question whose asker has left, so that nobody reports it as overlooked."""
    if not task.cancelled():
        task.exception()
