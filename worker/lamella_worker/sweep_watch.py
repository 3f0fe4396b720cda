"""Judges by an engine's reports whether it still gets on: the deadline of a sweep, and when it has passed.

Owns the rule and no clock: times are given by the caller, in seconds of one monotonic clock. A sweep may take so many
times the longest one of late, and never less than a floor; before one was measured, as long as moving the whole model
over a very slow link takes. `turns_watch` joins the judgements on engines that take turns.
"""

from __future__ import annotations

import threading
from collections import deque

from lamella_engine.sequence_types import EngineCounters

SLOWEST_BYTES_PER_S = 20e6  # a network disk at its worst; only the first sweep is judged by it
REMEMBERED = 64  # sweeps (or groups of them) whose longest counts


class SweepWatch:
    """Watches one engine from when it opened; safe to use from any thread.

    Args:
        floor_s: what a sweep may take at least.
        num_sweeps: how many times the longest sweep of late one may take.
        size_bytes: the model's weights.
        now: when it opened.
    """

    def __init__(self, floor_s: float, num_sweeps: float, size_bytes: int, now: float) -> None:
        self._floor_s = floor_s
        self._num_sweeps = num_sweeps
        self._first_s = max(floor_s, size_bytes / SLOWEST_BYTES_PER_S)
        self._lock = threading.Lock()
        self._heard_at = self._moved_at = now
        self._is_busy = self._is_stalled = False
        self._mark: tuple[float, ...] = ()
        self._sweeps = 0
        self._sweep_s = 0.0
        self._measured: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def deadline_s(self) -> float:
        """Seconds that may pass without anything moving."""
        with self._lock:
            return self._deadline_s()

    def hear(self, counters: EngineCounters, *, is_stalled: bool, now: float) -> None:
        """Take note of a report; an engine that waits for its events to be taken cannot be blamed."""
        mark = (
            counters.sweeps, counters.tokens, counters.out_of_memory,
            counters.read_s, counters.copy_s, counters.compute_s, counters.sweep_s,
        )  # fmt: skip
        with self._lock:
            self._heard_at, self._is_stalled = now, is_stalled
            was_busy, self._is_busy = self._is_busy, counters.running + counters.waiting > 0
            if counters.sweeps > self._sweeps:
                self._measure(counters, now)
            if mark != self._mark or is_stalled or not self._is_busy or not was_busy:
                self._mark, self._moved_at = mark, now

    def forgive(self, now: float) -> None:
        """The watcher itself did not run: nobody is blamed for that time."""
        with self._lock:
            self._heard_at = self._moved_at = now

    def silent_s(self, now: float) -> float:
        """Seconds since the last report."""
        with self._lock:
            return now - self._heard_at

    def stuck_s(self, now: float) -> float | None:
        """Seconds since anything moved; None where nothing has to: no sequence is there, or no event can be taken."""
        with self._lock:
            return now - self._moved_at if self._is_busy and not self._is_stalled else None

    def _measure(self, counters: EngineCounters, now: float) -> None:
        more = counters.sweeps - self._sweeps
        seconds = counters.sweep_s - self._sweep_s
        self._measured.append(seconds / more if seconds > 0 else max(0.0, now - self._moved_at) / more)
        self._sweeps, self._sweep_s = counters.sweeps, counters.sweep_s

    def _deadline_s(self) -> float:
        if not self._measured:
            return self._first_s
        return max(self._floor_s, self._num_sweeps * max(self._measured))
