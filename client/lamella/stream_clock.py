"""The deadlines of reading one stream: the caller's, that of healing a lost connection, and the pauses between tries.

Shared by both readers; does no I/O.
"""

from __future__ import annotations

import time

from lamella.errors import WaitTimeout
from lamella.server_errors import is_passing, translated

SILENCE_S = 1.0  # after this long without a message the stored events are read
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
DEFAULT_HEAL_S = 60.0
DEFAULT_WAIT_S = 3600.0


class StreamClock:
    """When to give up; changed only by its reader."""

    def __init__(self, job_id: str, url: str, timeout_s: float, heal_s: float) -> None:
        self._job_id = job_id
        self._url = url
        self._timeout_s = timeout_s
        self._heal_s = heal_s
        self._deadline = time.monotonic() + timeout_s
        self._lost_at: float | None = None
        self._pause_s = FIRST_PAUSE_S

    def wait_s(self, last: int) -> float:
        """Return how long to wait for the next message.

        Raises:
            WaitTimeout: the caller's deadline passed; `last` is named as the place to go on from.
        """
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise WaitTimeout(
                f"job {self._job_id} has not ended within {self._timeout_s:g} s; it goes on. "
                f"Stream it from here with client.job({self._job_id!r}).stream(after={last})."
            )
        return min(remaining, SILENCE_S)

    def answered(self) -> None:
        """Note that the server answered."""
        self._lost_at = None
        self._pause_s = FIRST_PAUSE_S

    def failed(self, error: Exception) -> float:
        """Note a failure of the connection and return the pause before the next try.

        Raises:
            ServerUnreachable: no answer for as long as healing may take.
            ServerRefused: trying again cannot help.
        """
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
        if not is_passing(error) or now - self._lost_at >= self._heal_s:
            raise translated(error, self._url) from error
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return max(0.0, min(pause_s, self._deadline - now, self._lost_at + self._heal_s - now))
