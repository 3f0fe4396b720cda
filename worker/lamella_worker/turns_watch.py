"""Judges whether an engine process still gets on whose engines take turns: one that waits for its turn is not hung.

Owns the rule that joins the judgements of `sweep_watch`: the process is hung when none of those that have something to
do got on for as long as the slowest of them may take. `supervisor` feeds it and acts on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from lamella_engine.sequence_types import EngineCounters
from lamella_worker.sweep_watch import SweepWatch


class TurnsWatch:
    """Watches the engines of one process from when they opened; safe to use from any thread.

    Args:
        watches: one for each engine, by its model; at least one.
    """

    def __init__(self, watches: Mapping[str, SweepWatch]) -> None:
        self._watches = dict(watches)

    def hear(self, model: str, counters: EngineCounters, *, is_stalled: bool, now: float) -> None:
        """Take note of a report about one engine."""
        watch = self._watches.get(model)
        if watch is not None:
            watch.hear(counters, is_stalled=is_stalled, now=now)

    def forgive(self, now: float) -> None:
        """The watcher itself did not run: nobody is blamed for that time."""
        for watch in self._watches.values():
            watch.forgive(now)

    def complaint(self, now: float) -> str | None:
        """Why the process counts as hung, or None."""
        watches = list(self._watches.values())
        deadline_s = max(watch.deadline_s for watch in watches)
        silent_s = min(watch.silent_s(now) for watch in watches)
        if silent_s > deadline_s:
            return f"it gave no sign of life for {silent_s:.1f} s, and {deadline_s:.1f} s are allowed"
        stuck = [(stuck_s, watch.deadline_s) for watch in watches if (stuck_s := watch.stuck_s(now)) is not None]
        if not stuck:
            return None
        stuck_s, deadline_s = min(stuck)[0], max(deadline_s for _, deadline_s in stuck)
        if stuck_s > deadline_s:
            return f"its sweep did not get on for {stuck_s:.1f} s, and {deadline_s:.1f} s are allowed"
        return None
