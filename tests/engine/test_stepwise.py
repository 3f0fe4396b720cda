"""Forwards side by side: every layer once for all of them, and nothing left behind whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from lamella_engine.errors import EngineError
from lamella_engine.sequence_state import SequenceState
from lamella_engine.stepwise import SideBySide


class Layer(nn.Module):
    """Adds its number, or fails when a sequence reaches its limit."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.max() > 100:
            raise ValueError("too large")
        return hidden + self.number


class Head(nn.Module):
    """Doubles; counts its calls and the rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows.append(hidden.shape[0])
        return 2 * hidden


def walk(layers: list[nn.Module], head: nn.Module | None, start: float, tokens: int) -> torch.Tensor:
    hidden = torch.full((1, tokens, 3), start)
    for layer in layers:
        hidden = layer(hidden)
    return hidden[0, -1] if head is None else head(hidden)[0, -1]


class Log:
    """What became of the layers, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def begin(self, index: int) -> None:
        self.events.append(f"begin {index}")

    def end(self, index: int) -> None:
        self.events.append(f"end {index}")


def steps(*forwards: Callable[[], torch.Tensor]) -> list[tuple[SequenceState, Callable[[], torch.Tensor]]]:
    return [(SequenceState(), forward) for forward in forwards]


def test_each_layer_is_brought_once_for_all_sequences() -> None:
    layers: list[nn.Module] = [Layer(1), Layer(2), Layer(3)]
    side_by_side = SideBySide(layers, None)
    log = Log()

    results = side_by_side.run(
        steps(*(partial(walk, layers, None, start, tokens) for start, tokens in [(0, 1), (10, 4), (20, 2)])),
        log.begin,
        log.end,
    )

    assert [result[0].item() for result in results] == [6, 16, 26]
    assert log.events == ["begin 0", "end 0", "begin 1", "end 1", "begin 2", "end 2"]


def test_the_head_runs_once_on_the_last_position_of_each() -> None:
    layers: list[nn.Module] = [Layer(1)]
    head = Head()
    side_by_side = SideBySide(layers, head)
    log = Log()

    results = side_by_side.run(
        steps(partial(walk, layers, head, 0.0, 5), partial(walk, layers, head, 4.0, 1)), log.begin, log.end
    )

    assert [result.tolist() for result in results] == [[2.0] * 3, [10.0] * 3]
    assert head.rows == [2]


@pytest.mark.parametrize("order", [[0, 2, 1], [0, 1], [0, 0, 1, 2], [0, 1, 2, 2], []])
def test_layers_out_of_order_are_refused(order: list[int]) -> None:
    layers: list[nn.Module] = [Layer(1), Layer(2), Layer(3)]
    side_by_side = SideBySide(layers, None)
    log = Log()

    with pytest.raises(EngineError, match="awaited"):
        side_by_side.run(steps(partial(walk, [layers[i] for i in order], None, 0.0, 1)), log.begin, log.end)


def test_a_failure_ends_all_forwards_and_the_next_run_works() -> None:
    layers: list[nn.Module] = [Layer(1), Layer(60), Layer(60)]
    side_by_side = SideBySide(layers, None)
    log = Log()
    unwound: list[float] = []

    def watched(start: float) -> torch.Tensor:
        try:
            return walk(layers, None, start, 1)
        finally:
            unwound.append(start)

    with pytest.raises(ValueError, match="too large"):
        side_by_side.run(steps(*(partial(watched, start) for start in (0.0, 70.0, 1.0))), log.begin, log.end)
    results = side_by_side.run(steps(partial(watched, -30.0)), log.begin, log.end)

    assert sorted(unwound) == [-30.0, 0.0, 1.0, 70.0]
    assert results[0][0].item() == 91


def test_a_layer_outside_a_sweep_is_refused() -> None:
    layers: list[nn.Module] = [Layer(1)]
    SideBySide(layers, None)

    with pytest.raises(EngineError, match="outside a sweep"):
        walk(layers, None, 0.0, 1)


def test_what_a_family_keeps_in_its_modules_belongs_to_the_sequence() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: torch.Tensor | None = None

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.seen = hidden if self.seen is None else self.seen + hidden
            return self.seen

    layers: list[nn.Module] = [Counting()]
    side_by_side = SideBySide(layers, None, [["seen"]])
    states = [SequenceState(), SequenceState()]
    log = Log()
    forwards = [partial(walk, layers, None, start, 1) for start in (1.0, 10.0)]

    for _ in range(3):
        results = side_by_side.run(list(zip(states, forwards, strict=True)), log.begin, log.end)

    assert [result[0].item() for result in results] == [3.0, 30.0]
    assert layers[0].seen is None
    assert [state.nbytes for state in states] == [12, 12]
