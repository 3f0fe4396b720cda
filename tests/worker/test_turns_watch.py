"""Engines that take turns: one that waits is not hung, and a hang is seen though another stood still before."""

from __future__ import annotations

from dataclasses import replace

from lamella_engine.sequence_types import EngineCounters
from lamella_worker.sweep_watch import SweepWatch
from lamella_worker.turns_watch import TurnsWatch

BUSY = EngineCounters(running=2, waiting=0, sweeps=0, tokens=0, streamed_bytes=0, peak_rss_bytes=0, last_sweep_at=None)
IDLE = replace(BUSY, running=0)
FLOOR_S, SWEEPS = 10.0, 20.0


def watch() -> TurnsWatch:
    return TurnsWatch({name: SweepWatch(FLOOR_S, SWEEPS, 0, 0.0) for name in "ab"})


def after(num_sweeps: int, seconds_each: float = 0.1) -> EngineCounters:
    return replace(BUSY, sweeps=num_sweeps, sweep_s=num_sweeps * seconds_each)


def test_an_engine_that_waits_for_its_turn_is_not_hung() -> None:
    watched = watch()

    for second in range(1, 100):
        watched.hear("a", after(second), is_stalled=False, now=float(second))
        watched.hear("b", after(3), is_stalled=False, now=float(second))

    assert watched.complaint(99.0) is None


def test_it_is_hung_when_nobody_with_something_to_do_gets_on() -> None:
    watched = watch()

    for second in range(1, 20):
        watched.hear("a", after(5), is_stalled=False, now=float(second))
        watched.hear("b", after(3), is_stalled=False, now=float(second))

    assert watched.complaint(10.9) is None
    assert "its sweep did not get on for 18.0 s" in (watched.complaint(19.0) or "")


def test_one_that_stands_idle_or_stalled_does_not_hide_that_the_other_hangs() -> None:
    for counters, is_stalled in ((IDLE, False), (BUSY, True)):
        watched = watch()

        for second in range(1, 20):
            watched.hear("a", after(5), is_stalled=False, now=float(second))
            watched.hear("b", counters, is_stalled=is_stalled, now=float(second))

        assert "did not get on" in (watched.complaint(19.0) or "")


def test_while_one_has_long_sweeps_the_other_may_wait_as_long_as_those_may_take() -> None:
    watched = watch()
    watched.hear("a", after(1, 5.0), is_stalled=False, now=5.0)
    watched.hear("b", after(1), is_stalled=False, now=5.0)

    for second in range(6, 100):
        watched.hear("a", after(1, 5.0), is_stalled=False, now=float(second))
        watched.hear("b", after(1), is_stalled=False, now=float(second))

    assert watched.complaint(99.0) is None
    assert "100.0 s are allowed" in (watched.complaint(106.0) or "")


def test_silence_of_all_is_a_hang() -> None:
    watched = watch()
    watched.hear("b", IDLE, is_stalled=False, now=5.0)

    assert watched.complaint(14.9) is None
    assert "no sign of life for 10.1 s" in (watched.complaint(15.1) or "")
