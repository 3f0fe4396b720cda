"""All streams of a gateway over one subscription: a thousand waiting requests cost one connection and one task.

Owns the subscription, its task, and how it heals: after a loss every follower reads from the store what it may have
missed. The order of a job's events is `lamella.stream_order`'s. Neighbour: `follower` (one stream).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from lamella.connection import AsyncConnection
from lamella_gateway.follower import Follower

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
LOOK_S = 1.0  # how long one read of the subscription may take

log = logging.getLogger(__name__)


class LiveBoard:
    """Hands what is published about jobs to those who follow them; for one event loop."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._followers: dict[str, set[Follower]] = {}
        self._pubsub: PubSub | None = None
        self._sending = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen."""
        self._task = asyncio.create_task(self._listen(), name="live-board")

    async def close(self) -> None:
        """Stop; harmless when repeated."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def follow(self, job_id: str, after: int = 0) -> Follower:
        """Return a follower of the job's events above `after`; it must be left with `leave`."""
        follower = Follower(self._connection, job_id, after)
        channel = self._connection.keys.channel(job_id)
        is_first = channel not in self._followers
        self._followers.setdefault(channel, set()).add(follower)
        if is_first:
            await self._say("subscribe", channel)
        else:
            follower.confirmed()
        return follower

    async def leave(self, follower: Follower) -> None:
        """Stop following; harmless when repeated."""
        channel = self._connection.keys.channel(follower.job_id)
        others = self._followers.get(channel)
        if others is None:
            return
        others.discard(follower)
        if not others:
            del self._followers[channel]
            await self._say("unsubscribe", channel)

    async def _say(self, what: str, channel: str) -> None:
        """Subscribe or unsubscribe; a lost connection is the listener's to mend, which subscribes to all there are."""
        pubsub = self._pubsub
        if pubsub is None:
            return
        async with self._sending:
            if what == "unsubscribe" and channel in self._followers:
                return
            with contextlib.suppress(RedisError, OSError):
                await (pubsub.subscribe(channel) if what == "subscribe" else pubsub.unsubscribe(channel))

    async def _listen(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async with contextlib.aclosing(self._connection.reader().pubsub()) as pubsub:
                    await self._open(pubsub)
                    pause_s = FIRST_PAUSE_S
                    while True:
                        self._take(await pubsub.get_message(timeout=LOOK_S))
            except (RedisError, OSError) as error:
                log.warning("the subscription was lost and is made anew: %s", type(error).__name__)
            finally:
                self._pubsub = None
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _open(self, pubsub: PubSub) -> None:
        async with self._sending:
            self._pubsub = pubsub  # before the list is read, so that who comes later subscribes by itself
            await pubsub.subscribe(self._connection.keys.channel("gateway"), *self._followers)

    def _take(self, message: dict[str, object] | None) -> None:
        if message is None:
            return
        for follower in tuple(self._followers.get(str(message["channel"]), ())):
            if message["type"] == "message":
                follower.published(str(message["data"]))
            elif message["type"] == "subscribe":
                follower.confirmed()
