"""Carries a run of many jobs to the server over a synchronous connection; parallel to `map_async`.

Owns the waiting between two looks, and that what is under way is cancelled when the run is left early.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator

from lamella.connection import Connection
from lamella.errors import LamellaError, ServerError
from lamella.map_away import AwayClock
from lamella.map_run import MapResult, MapRun

log = logging.getLogger(__name__)


def drive(connection: Connection, run: MapRun, after_round: Callable[[], None]) -> Generator[MapResult, None, None]:
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
                    connection.run(operation)
            except ServerError as error:
                pause_s = clock.failed(error)
            else:
                pause_s = clock.answered()
            yield from run.ready()
            after_round()
            if not run.is_finished:
                time.sleep(pause_s)
    finally:
        if not run.is_finished:
            _cancel(connection, run)


def _cancel(connection: Connection, run: MapRun) -> None:
    try:
        for operation in run.cancel_rest():
            connection.run(operation)
    except LamellaError as error:  # the client is closed, or the server away: then the jobs go on
        log.warning("jobs under way could not be cancelled: %s", error)
