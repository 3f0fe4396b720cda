"""How often an engine process is started again, after which pauses, and with how large a batch."""

from __future__ import annotations

from lamella_worker.restart_rule import LONGEST_PAUSE_S, STEADY_S, BatchSize, RestartRule


def test_pauses_double_up_to_a_limit() -> None:
    rule = RestartRule(100, 1e9)

    pauses = [rule.pause_s(float(n), 1.0) for n in range(9)]

    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_an_engine_that_served_for_a_while_is_started_again_at_once() -> None:
    rule = RestartRule(100, 1e9)
    for n in range(5):
        rule.pause_s(float(n), 1.0)

    assert rule.pause_s(100.0, STEADY_S) == 0.5
    assert rule.pause_s(101.0, 1.0) == 1.0


def test_too_many_restarts_within_the_window_are_the_end() -> None:
    rule = RestartRule(3, 100.0)

    pauses = [rule.pause_s(float(n), 1.0) for n in (0, 10, 20, 30)]

    assert pauses[:3] == [0.5, 1.0, 2.0]
    assert pauses[3] is None
    assert rule.pause_s(101.0, 1.0) is not None, "the first one has left the window"


def test_a_rule_that_allows_no_restart_gives_none() -> None:
    assert RestartRule(0, 100.0).pause_s(0.0, 1e6) is None


def test_the_batch_halves_down_to_one() -> None:
    batch = BatchSize(9)

    halved = [(batch.halve(), batch.current) for _ in range(5)]

    assert halved == [(True, 4), (True, 2), (True, 1), (False, 1), (False, 1)]
