"""Carries a run of many jobs to the server over an asyncio connection; parallel to `map_sync`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from lamella.connection import AsyncConnection
from lamella.errors import LamellaError, ServerError
from lamella.map_away import AwayClock
from lamella.map_run import MapResult, MapRun

log = logging.getLogger(__name__)


async def drive_async(
    connection: AsyncConnection, run: MapRun, after_round: Callable[[], None]
) -> AsyncGenerator[MapResult, None]:
    """Yield the results in order; `after_round` is called after every look, and may raise to leave.

    Raises:
        ServerUnreachable, ServerRefused: the server was away for longer than the run's bounds say.
        WaitTimeout: no job has brought anything for as long.
    """
    clock = AwayClock(run)
    try:
        while not run.is_finished:
            try:
                for operation in run.operations():
                    await connection.run(operation)
            except ServerError as error:
                pause_s = clock.failed(error)
            else:
                pause_s = clock.answered()
            for result in run.ready():
                yield result
            after_round()
            if not run.is_finished:
                await asyncio.sleep(pause_s)
    finally:
        if not run.is_finished:
            await _cancel(connection, run)


async def _cancel(connection: AsyncConnection, run: MapRun) -> None:
    try:
        for operation in run.cancel_rest():
            await connection.run(operation)
    except LamellaError as error:  # the client is closed, or the server away: then the jobs go on
        log.warning("jobs under way could not be cancelled: %s", error)
