"""Books what ended jobs used, whoever submitted them: one task that goes through the bills that are open.

Owns the task and its pace. Jobs whose end a gateway sees are settled at once; this is for background responses and for
jobs of gateways that died. Several gateways may do the same work: a bill is settled once (``settle.lua``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from lamella.errors import LamellaError
from lamella_gateway.meter import Meter

EVERY_S = 2.0

log = logging.getLogger(__name__)


class Settler:
    """Started and closed with the gateway."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._task: asyncio.Task[None] | None = None
        self._ended: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="settler")

    async def close(self) -> None:
        """End, after what is being settled now; harmless when repeated."""
        if self._ended:
            await asyncio.wait(self._ended, timeout=2.0)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def ended(self, job_ids: list[str]) -> None:
        """Settle jobs that have just ended, without anybody waiting for it."""
        task = asyncio.create_task(self._settle(job_ids))
        self._ended.add(task)
        task.add_done_callback(self._ended.discard)

    async def _run(self) -> None:
        while True:
            cursor = 0
            try:
                while True:
                    cursor, job_ids = await self._meter.unbilled(cursor)
                    await self._settle(job_ids)
                    if cursor == 0:
                        break
            except LamellaError as error:
                log.warning("bills are settled later: %s", error)
            await asyncio.sleep(EVERY_S)

    async def _settle(self, job_ids: list[str]) -> None:
        for job_id in job_ids:
            try:
                await self._meter.settle(job_id)
            except LamellaError as error:
                log.warning("job=%s is billed later: %s", job_id, error)
