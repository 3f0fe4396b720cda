"""Turns of engines that share a thread: fair by time, none for who idles, none lost by who waits."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lamella_engine.sweep_turns import SweepTurns


def take_turns(turns: SweepTurns, sweeps: dict[str, float], until_s: float) -> Counter[str]:
    """Let all of `sweeps` (seconds of each one's sweep) want turns until so much time is used; seconds of each."""
    used: Counter[str] = Counter()
    while sum(used.values()) < until_s:
        name = turns.next(sweeps)
        assert name is not None
        turns.charge(name, sweeps[name])
        used[name] += sweeps[name]  # type: ignore[assignment]  # seconds, which a counter adds up all the same
    return used


def test_two_engines_that_always_want_turns_get_equal_time_however_long_their_sweeps_are() -> None:
    turns = SweepTurns({"long": 1.0, "short": 1.0})

    used = take_turns(turns, {"long": 1.0, "short": 0.01}, until_s=100.0)

    assert used["long"] == pytest.approx(used["short"], abs=1.01)


def test_time_is_shared_by_the_shares() -> None:
    turns = SweepTurns({"a": 3.0, "b": 1.0})

    used = take_turns(turns, {"a": 0.1, "b": 0.4}, until_s=200.0)

    assert used["a"] / used["b"] == pytest.approx(3.0, rel=0.05)


def test_an_idle_engine_never_has_the_turn() -> None:
    turns = SweepTurns({"idle": 1.0, "busy": 1.0})

    used = take_turns(turns, {"busy": 0.1}, until_s=10.0)

    assert set(used) == {"busy"}
    assert turns.next([]) is None


def test_who_comes_back_from_idling_has_no_credit_for_it() -> None:
    turns = SweepTurns({"idle": 1.0, "busy": 1.0})
    take_turns(turns, {"busy": 0.1}, until_s=1000.0)

    used = take_turns(turns, {"idle": 0.1, "busy": 0.1}, until_s=20.0)

    assert used["idle"] == pytest.approx(used["busy"], abs=0.21)


def test_who_comes_back_is_next() -> None:
    turns = SweepTurns({"a": 1.0, "b": 1.0})
    take_turns(turns, {"a": 5.0}, until_s=50.0)
    take_turns(turns, {"b": 1.0}, until_s=500.0)

    assert turns.next(["a", "b"]) == "a"


def test_who_used_much_while_alone_is_not_made_to_pay_for_it() -> None:
    turns = SweepTurns({"a": 1.0, "b": 1.0})
    take_turns(turns, {"a": 1.0}, until_s=1000.0)

    order = [take_turns(turns, {"a": 1.0, "b": 1.0}, until_s=1.0).most_common(1)[0][0] for _ in range(10)]

    assert order.count("a") == order.count("b") == 5


def test_of_any_engines_that_want_turns_all_the_time_none_falls_behind_by_more_than_a_sweep_of_each() -> None:
    numbers = random.Random(7)
    for _ in range(100):
        names = [f"m{index}" for index in range(numbers.randint(2, 6))]
        shares = {name: numbers.choice((0.5, 1.0, 4.0)) for name in names}
        sweeps = {name: numbers.uniform(0.001, 2.0) for name in names}
        turns = SweepTurns(shares)
        take_turns(turns, {names[0]: sweeps[names[0]]}, until_s=numbers.uniform(0.1, 50.0))

        used = take_turns(turns, sweeps, until_s=60.0)

        fair = [used[name] / shares[name] for name in names]
        longest = max(sweeps[name] / shares[name] for name in names)
        assert max(fair) - min(fair) <= 2 * longest + 1e-9, (shares, sweeps, used)
