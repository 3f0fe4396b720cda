"""Forwards of several sequences side by side: all of them run one layer before any of them runs the next.

Each sequence's forward is a coroutine that gives way where it calls a layer or the head. So every weight passes once
for all of them, though each runs transformers' own code with its own state. One thread and one stack each: nothing
runs at the same time. `sweep` brings the layers; `sequence_state` is what a forward calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from lamella_engine.errors import EngineError
from lamella_engine.sequence_state import SequenceState

Forward = tuple[SequenceState, Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class StepSpan:
    """Some more tokens of one sequence in one sweep, with the state they are added to."""

    token_ids: tuple[int, ...]
    start: int
    state: SequenceState


@dataclass(frozen=True)
class StepPack:
    """The spans of one sweep; `order` says, as in a packed sweep, which span each row of the logits is of."""

    spans: tuple[StepSpan, ...]

    @property
    def order(self) -> list[int]:
        """Rows come as the spans do."""
        return list(range(len(self.spans)))

    @property
    def num_tokens(self) -> int:
        """Tokens of all spans."""
        return sum(len(span.token_ids) for span in self.spans)


@dataclass(frozen=True)
class _AtLayer:
    """A forward waits until layer `index` has its weights."""

    index: int


@dataclass(frozen=True)
class _AtHead:
    """A forward waits for the logits of `hidden`, [..., rows, width]."""

    hidden: torch.Tensor


class _Runner(greenlet):
    """One sequence's forward; of the last `rows` positions the logits are wanted."""

    def __init__(self, state: SequenceState, forward: Callable[[], torch.Tensor], rows: int) -> None:
        super().__init__(forward)
        self.state = state
        self.rows = rows


class SideBySide:
    """Takes the place of the forwards of `layers` and of `head`; used by one thread at a time.

    Args:
        layers: in the order in which a forward calls them, each once.
        head: gives the logits; it is called once a run, for all forwards together.
        in_modules: for each layer, the attributes of its modules that belong to a sequence's state.
    """

    def __init__(
        self, layers: Iterable[nn.Module], head: nn.Module | None, in_modules: Sequence[Sequence[str]] = ()
    ) -> None:
        self._num_layers = 0
        self._head: Callable[[torch.Tensor], torch.Tensor] | None = None
        for index, layer in enumerate(layers):
            self._num_layers += 1
            kept = [_Attribute(layer, index, path) for path in (in_modules[index] if in_modules else ())]
            layer.forward = _waiting(index, layer.forward, kept)
        if head is not None:
            self._head = head.forward
            head.forward = _ask_head

    def run(
        self,
        forwards: Sequence[Forward],
        begin_layer: Callable[[int], None],
        end_layer: Callable[[int], None],
        rows: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """What each of `forwards`, which work on a state each, returns.

        `begin_layer` and `end_layer` are called around each layer, for all of them at once. The head gives each one
        the logits of its last position, or of its last ``rows[i]`` positions.

        Raises:
            EngineError: a forward did not call the layers once each, in order.
        """
        runners = _runners(forwards, rows)
        try:
            news = self._pass_layers(runners, begin_layer, end_layer)
            while any(isinstance(item, _AtHead) for item in news):
                news = self._pass_head(runners, news)
            self._check_arrival([item for item in news if isinstance(item, _AtLayer)], None)
            return news
        finally:
            _end_all(runners)

    def run_each(
        self,
        forwards: Sequence[Forward],
        begin_layer: Callable[[int], None],
        end_layer: Callable[[int], None],
        rows: Sequence[int],
    ) -> Iterator[torch.Tensor]:
        """As `run`, but the head is called for one forward after the other, each time its result is asked for.

        So the logits of many positions need not be there for all of them together.
        """
        runners = _runners(forwards, rows)
        try:
            for index, item in enumerate(self._pass_layers(runners, begin_layer, end_layer)):
                news = [item]
                while isinstance(news[0], _AtHead):
                    news = self._pass_head(runners[index : index + 1], news)
                self._check_arrival([item for item in news if isinstance(item, _AtLayer)], None)
                yield news[0]
        finally:
            _end_all(runners)

    def _pass_layers(
        self, runners: Sequence[greenlet], begin_layer: Callable[[int], None], end_layer: Callable[[int], None]
    ) -> list[Any]:
        """What became of everyone after the last layer."""
        news = [runner.switch() for runner in runners]
        for index in range(self._num_layers):
            self._check_arrival(news, index)
            begin_layer(index)
            news = [runner.switch() for runner in runners]
            end_layer(index)
        return news

    def _pass_head(self, runners: Sequence[greenlet], news: list[Any]) -> list[Any]:
        """Logits of all who wait for them in one product, and what became of everyone after it."""
        waiting = [index for index, item in enumerate(news) if isinstance(item, _AtHead)]
        assert self._head is not None, "who waits has called it"
        rows = [news[index].hidden for index in waiting]
        flat = [row.reshape(-1, row.shape[-1]) for row in rows]
        logits = self._head(torch.cat(flat))
        after = list(news)
        for index, row, part in zip(waiting, rows, torch.split(logits, [len(each) for each in flat]), strict=True):
            after[index] = runners[index].switch(part.reshape(*row.shape[:-1], -1))
        return after

    def _check_arrival(self, news: Sequence[Any], index: int | None) -> None:
        for item in news:
            if not isinstance(item, _AtLayer) or item.index != index:
                came = f"layer {item.index}" if isinstance(item, _AtLayer) else "its end"
                awaited = "its end" if index is None else f"layer {index}"
                raise EngineError(
                    f"the model came to {came} where {awaited} was awaited; layers that are skipped, repeated or run "
                    "out of order cannot be streamed"
                )


class _Attribute:
    """An attribute of a module in which a family keeps its state; it is the module's only while a layer runs."""

    def __init__(self, layer: nn.Module, index: int, path: str) -> None:
        owner, _, self._name = path.rpartition(".")
        self._module = layer.get_submodule(owner)
        self._key = (index, path)
        self._initial = getattr(self._module, self._name, None)

    def lend(self, state: SequenceState) -> None:
        setattr(self._module, self._name, state.in_modules.get(self._key, self._initial))

    def take_back(self, state: SequenceState) -> None:
        state.in_modules[self._key] = getattr(self._module, self._name)
        setattr(self._module, self._name, self._initial)


def _waiting(index: int, forward: Callable[..., Any], kept: Sequence[_Attribute]) -> Callable[..., Any]:
    def run_layer(*args: Any, **kwargs: Any) -> Any:
        _give_way(_AtLayer(index))
        if not kept:
            return forward(*args, **kwargs)
        runner = getcurrent()
        assert isinstance(runner, _Runner), "`_give_way` has come back to it"
        for attribute in kept:
            attribute.lend(runner.state)
        try:
            return forward(*args, **kwargs)
        finally:
            for attribute in kept:
                attribute.take_back(runner.state)

    return run_layer


def _ask_head(hidden: torch.Tensor) -> torch.Tensor:
    """Mostly only the last position's logits are wanted; some families ask for those of all positions."""
    runner = getcurrent()
    rows = runner.rows if isinstance(runner, _Runner) else 1
    logits: torch.Tensor = _give_way(_AtHead(hidden[..., -rows:, :]))
    return logits


def _give_way(news: _AtLayer | _AtHead) -> Any:
    runner = getcurrent()
    if not isinstance(runner, _Runner) or runner.parent is None:
        raise EngineError("a streamed layer was called outside a sweep")
    return runner.parent.switch(news)


def _runners(forwards: Sequence[Forward], rows: Sequence[int] | None) -> list[_Runner]:
    counts = rows or [1] * len(forwards)
    return [_Runner(state, forward, count) for (state, forward), count in zip(forwards, counts, strict=True)]


def _end_all(runners: Sequence[greenlet]) -> None:
    """Unwind the forwards that wait; their own clean-up may not stop it."""
    for runner in runners:
        while runner and not runner.dead:
            runner.throw(GreenletExit)
