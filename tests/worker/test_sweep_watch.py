"""When an engine counts as hung: never while it gets on, waits for its consumer, or has nothing to do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from lamella_engine.sequence_types import EngineCounters
from lamella_worker.sweep_watch import SLOWEST_BYTES_PER_S, SweepWatch
from lamella_worker.turns_watch import TurnsWatch

BUSY = EngineCounters(running=2, waiting=0, sweeps=0, tokens=0, streamed_bytes=0, peak_rss_bytes=0, last_sweep_at=None)
IDLE = replace(BUSY, running=0)
FLOOR_S, SWEEPS = 10.0, 20.0


class Alone:
    """The watch of a process that has one engine."""

    def __init__(self, size_bytes: int) -> None:
        self._sweeps = SweepWatch(FLOOR_S, SWEEPS, size_bytes, 0.0)
        self._turns = TurnsWatch({"m": self._sweeps})
        self.hear = partial(self._turns.hear, "m")
        self.forgive, self.complaint = self._turns.forgive, self._turns.complaint

    @property
    def deadline_s(self) -> float:
        return self._sweeps.deadline_s


def watch(size_bytes: int = 0) -> Alone:
    return Alone(size_bytes)


def after_sweeps(num_sweeps: int, seconds_each: float) -> EngineCounters:
    return replace(BUSY, sweeps=num_sweeps, sweep_s=num_sweeps * seconds_each)


def test_an_engine_whose_sweeps_go_on_is_well() -> None:
    watched = watch()

    for second in range(100):
        watched.hear(after_sweeps(second, 0.5), is_stalled=False, now=float(second))

    assert watched.complaint(100.0) is None


def test_a_busy_engine_that_does_not_move_is_hung_though_it_beats() -> None:
    watched = watch()
    watched.hear(after_sweeps(3, 0.1), is_stalled=False, now=1.0)

    for second in range(2, 12):
        watched.hear(after_sweeps(3, 0.1), is_stalled=False, now=float(second))
        early = watched.complaint(11.0)

    assert early is None
    assert "its sweep did not get on for 10.1 s" in (watched.complaint(11.1) or "")


def test_an_engine_that_says_nothing_at_all_is_hung_busy_or_not() -> None:
    watched = watch()
    watched.hear(IDLE, is_stalled=False, now=1.0)

    assert watched.complaint(10.9) is None
    assert "no sign of life" in (watched.complaint(11.1) or "")


@pytest.mark.parametrize("case", ["idle", "stalled"])
def test_an_engine_that_has_nothing_to_do_or_waits_for_its_consumer_is_well(case: str) -> None:
    watched = watch()
    same = IDLE if case == "idle" else BUSY

    for second in range(1, 1000):
        watched.hear(same, is_stalled=case == "stalled", now=float(second))

    assert watched.complaint(1000.0) is None


def test_the_time_before_the_first_sequence_came_does_not_count() -> None:
    watched = watch()
    for second in range(1, 1000):
        watched.hear(IDLE, is_stalled=False, now=float(second))

    watched.hear(BUSY, is_stalled=False, now=1000.0)

    assert watched.complaint(1009.0) is None


@pytest.mark.parametrize("figure", ["read_s", "copy_s", "compute_s"])
def test_a_long_sweep_whose_layers_go_on_is_well(figure: str) -> None:
    watched = watch()

    for second in range(1, 100):
        watched.hear(replace(BUSY, **{figure: float(second)}), is_stalled=False, now=float(second))

    assert watched.complaint(100.0) is None


def test_the_deadline_follows_the_longest_sweep_of_late() -> None:
    watched = watch()
    watched.hear(after_sweeps(1, 2.0), is_stalled=False, now=2.0)
    long = watched.deadline_s
    for sweeps in range(1, 101):
        watched.hear(
            replace(BUSY, sweeps=1 + sweeps, sweep_s=2.0 + 0.1 * sweeps), is_stalled=False, now=2.0 + 0.1 * sweeps
        )

    assert long == pytest.approx(SWEEPS * 2.0)
    assert watched.deadline_s == FLOOR_S


def test_the_first_sweep_may_take_as_long_as_a_very_slow_disk_needs() -> None:
    assert watch(int(400 * SLOWEST_BYTES_PER_S)).deadline_s == pytest.approx(400.0)
    assert watch(1).deadline_s == FLOOR_S


def test_sweeps_without_measured_seconds_are_measured_by_when_they_came() -> None:
    watched = watch()
    watched.hear(BUSY, is_stalled=False, now=0.0)

    watched.hear(replace(BUSY, sweeps=1), is_stalled=False, now=3.0)

    assert watched.deadline_s == pytest.approx(SWEEPS * 3.0)


def test_nobody_is_blamed_for_the_time_in_which_the_watcher_slept() -> None:
    watched = watch()
    watched.hear(BUSY, is_stalled=False, now=1.0)

    watched.forgive(5000.0)

    assert watched.complaint(5009.0) is None
    assert watched.complaint(5011.0) is not None
