"""How long many jobs are followed without a server, or without a word of any job; does no I/O.

Shared by `map_sync` and `map_async`.
"""

from __future__ import annotations

import time

from lamella.errors import ServerError, WaitTimeout
from lamella.map_run import MapRun

LONGEST_PAUSE_S = 2.0


class AwayClock:
    """When to give up; changed only by its driver."""

    def __init__(self, run: MapRun) -> None:
        self._run = run
        self._lost_at: float | None = None

    @property
    def is_away(self) -> bool:
        """True while the server did not answer last."""
        return self._lost_at is not None

    def failed(self, error: ServerError) -> float:
        """Return the pause before the next try, or raise the error once the server was away for too long."""
        now = time.monotonic()
        self._lost_at = now if self._lost_at is None else self._lost_at
        away_s = now - self._lost_at
        if away_s >= self._run.bounds.away_s:
            raise error
        return min(max(0.1, away_s / 2), LONGEST_PAUSE_S)

    def answered(self) -> float:
        """Return the pause before the next look.

        Raises:
            WaitTimeout: no job has brought anything for too long.
        """
        self._lost_at = None
        if self._run.silent_s > self._run.bounds.silence_s:
            raise WaitTimeout(
                f"no job has brought anything for {self._run.bounds.silence_s:g} s; look with `lamella jobs` and "
                "`lamella workers`, or wait longer with a larger timeout_s"
            )
        return self._run.pause_s
