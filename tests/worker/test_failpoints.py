"""Faults on demand: where, when, in which process and for which prompt; and a refusal of what is not understood."""

from __future__ import annotations

import pytest

from lamella_worker.failpoints import VARIABLE, Failpoints


def fails(failpoints: Failpoints, point: str, text: str = "") -> bool:
    try:
        failpoints.hit(point, text)
    except (ValueError, MemoryError, RuntimeError):
        return True
    return False


def test_without_the_variable_nothing_happens() -> None:
    failpoints = Failpoints.from_environment(0, {})

    assert not failpoints.has("sweep")
    assert not fails(failpoints, "sweep")


def test_a_failpoint_acts_at_its_point_the_nth_time_only() -> None:
    failpoints = Failpoints.from_environment(0, {VARIABLE: "sweep=error@3"})

    assert failpoints.has("sweep")
    assert not fails(failpoints, "submit", "x")
    assert [fails(failpoints, "sweep") for _ in range(5)] == [False, False, True, False, False]


def test_a_plus_goes_on() -> None:
    failpoints = Failpoints("sweep=oom@2+", 0)

    assert [fails(failpoints, "sweep") for _ in range(4)] == [False, True, True, True]


def test_a_number_restricts_it_to_one_process() -> None:
    specification = "sweep=device@1#1; open=oom#0"

    assert not fails(Failpoints(specification, 0), "sweep")
    assert fails(Failpoints(specification, 1), "sweep")
    assert fails(Failpoints(specification, 0), "open")


def test_a_text_restricts_it_to_prompts_that_have_it() -> None:
    failpoints = Failpoints("submit=error@1+~bad", 0)

    assert [fails(failpoints, "submit", prompt) for prompt in ("good", "so bad", "bad")] == [False, True, True]


def test_a_sweep_with_a_text_counts_from_when_such_a_prompt_came() -> None:
    failpoints = Failpoints("sweep=error@2~bad", 0)

    before = [fails(failpoints, "sweep") for _ in range(3)]
    failpoints.hit("submit", "so bad")

    assert before == [False] * 3
    assert [fails(failpoints, "sweep") for _ in range(3)] == [False, True, False]


def test_a_point_of_the_worker_counts_like_the_others() -> None:
    failpoints = Failpoints("emit=error@2", None)

    assert [fails(failpoints, point) for point in ("emit", "emitted", "end", "emit", "emit")] == [
        *(False, False, False, True, False)
    ]


@pytest.mark.parametrize(
    "wrong", ["sweep", "sweep=explode", "nowhere=exit", "sweep=exit@x", "sweep=exit#", "emit=kill#0", "end=kill~x"]
)
def test_what_is_no_failpoint_is_refused_by_name(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"names '{wrong}'"):
        Failpoints(wrong, 0)
