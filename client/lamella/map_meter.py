"""How far many jobs are and how fast they go; does no I/O.

Neighbours: `map_sync` and `map_async`, which read it after each round; `map_bar` shows it on a terminal.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from lamella.map_run import MapCounts

WINDOW_S = 30.0
SAMPLE_EVERY_S = 0.5


class MapProgress(NamedTuple):
    """How far all jobs are; `total` is None if it is not known, `tokens_per_s` of the last half minute.

    `done` counts what has ended, `failed` what of that ended in an error; `seconds` is the time since the start.
    """

    done: int
    failed: int
    total: int | None
    in_flight: int
    tokens: int
    tokens_per_s: float
    seconds: float
    remaining_s: float | None


ProgressCall = Callable[[MapProgress], None]


class MapMeter:
    """Remembers a little of the past; changed only by `read`."""

    def __init__(self, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._started = clock()
        self._samples: deque[tuple[float, MapCounts]] = deque([(self._started, MapCounts())])

    def read(self, counts: MapCounts) -> MapProgress:
        """Return how far it is by the counts of now."""
        now = self._clock()
        if now - self._samples[-1][0] >= SAMPLE_EVERY_S:
            self._samples.append((now, counts))
            while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW_S:
                self._samples.popleft()
        since, before = self._samples[0]
        span = max(now - since, 1e-9)
        return MapProgress(
            done=counts.ended,
            failed=counts.failed,
            total=self._total,
            in_flight=counts.in_flight,
            tokens=counts.tokens,
            tokens_per_s=(counts.tokens - before.tokens) / span,
            seconds=now - self._started,
            remaining_s=self._remaining_s(counts, counts.ended - before.ended, span),
        )

    def _remaining_s(self, counts: MapCounts, ended: int, span: float) -> float | None:
        if self._total is None or ended <= 0:
            return None
        return (self._total - counts.ended) * span / ended
