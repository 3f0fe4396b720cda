"""How many sequences may run side by side after sweeps for which memory was short.

Owns the number and when it falls and rises; the `scheduler` keeps to it, the `engine` reports what became of each
sweep. It halves when memory was short and doubles again after many good sweeps, because what took the memory may have
been another process.
"""

from __future__ import annotations

GOOD_SWEEPS = 1000  # without trouble, before more may run again
ALONE_TRIES = 2  # sweeps of one sequence alone for which memory may be short; then it fails


class BatchLimit:
    """The limit of one engine, at most `most`; used by the sweep thread, read by anyone.

    Attributes:
        limit: sequences that may run side by side now.
        failures: sweeps for which memory was short, since the engine opened.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.limit = most
        self.failures = 0
        self._good = 0
        self._failed_alone = 0

    def good_sweep(self) -> bool:
        """Count a sweep that had enough memory; True if the limit has risen."""
        self._failed_alone = 0
        if self.limit == self._most:
            return False
        self._good += 1
        if self._good < GOOD_SWEEPS:
            return False
        self._good = 0
        self.limit = min(2 * self.limit, self._most)
        return True

    def shrink(self, num_running: int) -> bool:
        """Count a sweep of `num_running` sequences for which memory was short; False if trying again is in vain."""
        self.failures += 1
        self._good = 0
        self.limit = max(1, min(self.limit, num_running) // 2)
        if num_running > 1:
            return True
        self._failed_alone += 1
        return self._failed_alone < ALONE_TRIES
