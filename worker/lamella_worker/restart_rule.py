"""When an engine process that ended is started again, and when no more; and how large a batch its engine gets.

Owns both rules and no clock. `supervisor` asks.
"""

from __future__ import annotations

from collections import deque

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0  # an engine that served for so long has not failed in a row


class RestartRule:
    """Pauses that double from one failure in a row to the next, and an end after too many within a window.

    Args:
        most: restarts that may happen within the window.
        window_s: its length in seconds.
    """

    def __init__(self, most: int, window_s: float) -> None:
        self.most = most
        self.window_s = window_s
        self._restarts: deque[float] = deque()
        self._in_a_row = 0

    @property
    def in_window(self) -> int:
        """Restarts within the window, at the time of the last one."""
        return len(self._restarts)

    def pause_s(self, now: float, served_s: float) -> float | None:
        """Seconds to wait before the next start, after an engine that served for `served_s`; None for no more."""
        while self._restarts and now - self._restarts[0] > self.window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self.most:
            return None
        self._restarts.append(now)
        self._in_a_row = 0 if served_s >= STEADY_S else self._in_a_row
        self._in_a_row += 1
        return float(min(FIRST_PAUSE_S * 2 ** (self._in_a_row - 1), LONGEST_PAUSE_S))


class BatchSize:
    """Sequences that the next engine may run at most: halved after trouble with memory, until the worker ends.

    It does not grow again by itself. An engine that came through with less is left in peace; what was the trouble is
    for the operator to find, and a restart of the worker tries the whole batch again.
    """

    def __init__(self, most: int) -> None:
        self.current = most

    def halve(self) -> bool:
        """Allow half as many; False if it is one already."""
        if self.current == 1:
            return False
        self.current //= 2
        return True
