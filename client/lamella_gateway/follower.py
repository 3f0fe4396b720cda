"""One job's events for one request: what was published, healed from what is stored, each once and in order.

Owns a bounded buffer of what came and was not taken yet: a request that is too slow loses it and reads the store
instead, so nobody waits for it. Neighbours: `live_board` (feeds it), `generation` (takes from it).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from lamella.connection import AsyncConnection
from lamella.errors import ServerUnreachable
from lamella.keys import Keys
from lamella.steps import Operation
from lamella.stream_order import StreamItem, StreamOrder

MOST_BUFFERED = 256
SILENCE_S = 5.0  # after this long without a message the store is read
CONFIRM_S = 1.0  # so long the subscription may take before the store is read without it
HEAL_S = 60.0
PAUSE_S = 1.0


class Follower:
    """Made by `LiveBoard.follow`; one task takes from it."""

    def __init__(self, connection: AsyncConnection, job_id: str, after: int) -> None:
        self.job_id = job_id
        self._connection = connection
        self._order = StreamOrder(job_id, after, connection.ring)
        self._published: deque[str] = deque()
        self._has_news = False
        self._waiter: asyncio.Future[None] | None = None
        self._must_read = False
        self._lost_at: float | None = None
        self._wait_s = CONFIRM_S

    @property
    def ended(self) -> bool:
        """True once the job's last event was taken."""
        return self._order.ended

    def published(self, text: str) -> None:
        """Note a published message."""
        if len(self._published) >= MOST_BUFFERED:
            self._published.clear()
            self._must_read = True
        self._published.append(text)
        self._wake()

    def confirmed(self) -> None:
        """Note that from now on nothing published is missed."""
        self._wait_s = SILENCE_S
        self._must_read = True
        self._wake()

    async def next_items(self) -> list[StreamItem]:
        """Return the next events, at least one, or none where the job has ended before.

        Raises:
            JobNotFound: there is no record of the job.
            ServerUnreachable: the server was away for longer than HEAL_S.
        """
        while not self._order.ended:
            if not self._has_news and not await self._wait():
                self._must_read = True
            self._has_news = False
            items = await self._stored() if self._must_read else []
            while self._published and not self._order.behind:
                items += self._order.live(self._published.popleft())
            if self._published or self._order.behind:
                self._must_read = True
                self._has_news = True
            if items:
                return items
        return []

    def _wake(self) -> None:
        self._has_news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> bool:
        self._waiter = asyncio.get_running_loop().create_future()
        await asyncio.wait({self._waiter}, timeout=self._wait_s)
        return self._has_news

    async def _stored(self) -> list[StreamItem]:
        try:
            items = await self._connection.run(_read(self._order, self._connection.keys))
        except ServerUnreachable:
            now = time.monotonic()
            self._lost_at = self._lost_at or now
            if now - self._lost_at > HEAL_S:
                raise
            await asyncio.sleep(PAUSE_S)
            self._has_news = True
            return []
        self._lost_at = None
        self._must_read = self._order.behind
        return items


def _read(order: StreamOrder, keys: Keys) -> Operation[list[StreamItem]]:
    raw = yield order.stored_commands(keys)
    return order.stored(raw)
