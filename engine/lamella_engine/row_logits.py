"""Logits of many rows of a sweep, a piece at a time, through the model's own forward.

A sweep that serves requests wants one row of logits for each sequence; whoever measures wants those of most tokens,
and all of them at once are vocabulary times tokens. So the module that owns the layers runs once and what it gives is
kept; the forward around it is called again for each piece and finds only that piece's rows there. Whatever a family
does between its layers and its logits is done as ever. A head that passes by in blocks passes once as well: it is
given all rows together, and its logits wait in host memory. `sweep` calls this.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lamella_engine.packing import Pack
from lamella_engine.streamed_head import StreamedHead

Ask = Callable[[], torch.Tensor]


class RowLogits:
    """The pieces of one sweep after the other; used by one thread at a time.

    Args:
        backbone: the module that owns the layers; its result's first part is what the head is given.
        head: the head's module.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        self._backbone = backbone
        self._head = head

    def pieces(self, ask: Ask, rows: Sequence[torch.Tensor]) -> Generator[torch.Tensor, None, None]:
        """Logits of the rows `rows[i]` (int64), piece by piece; nothing else may run the model meanwhile.

        Args:
            ask: calls the model's forward and returns the logits of all rows that its backbone gives.
            rows: of what the backbone gives, [1, T, width].
        """
        kept = _Kept(self._backbone.forward)
        with _replaced(self._backbone, kept):
            streamed = self._head.forward
            if isinstance(streamed, StreamedHead):
                yield from self._through_streamed(streamed, kept, ask, rows)
                return
            for piece in rows:
                yield kept.ask(ask, piece)

    def _through_streamed(
        self, streamed: StreamedHead, kept: _Kept, ask: Ask, rows: Sequence[torch.Tensor]
    ) -> Generator[torch.Tensor, None, None]:
        given = _Listening(streamed.vocabulary)
        with _replaced(self._head, given):
            for piece in rows:
                kept.ask(ask, piece)
        hidden = torch.cat(given.hidden, -2)
        logits = torch.empty((*hidden.shape[:-1], streamed.vocabulary), dtype=hidden.dtype)
        streamed.fill(hidden, logits)
        first = 0
        for piece in rows:
            part = logits[..., first : first + len(piece), :]
            first += len(piece)
            with _replaced(self._head, lambda hidden, part=part: part.to(hidden.device)):
                answer = kept.ask(ask, piece)
            yield answer

    @contextmanager
    def heard(self) -> Iterator[Heard]:
        """What the backbone gives while the context lasts."""
        heard = Heard(self._backbone.forward)
        with _replaced(self._backbone, heard):
            yield heard


class Heard:
    """Takes the place of a backbone's forward: runs it, and remembers the hidden states that it gives.

    Attributes:
        hidden: of the last run, [T, width]; None before it.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self.hidden: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        output = self._forward(*args, **kwargs)
        self.hidden = (output[0] if isinstance(output, tuple) else output.last_hidden_state)[0]
        return output


class _Kept:
    """Takes the place of the backbone's forward: runs it once, then gives the wanted rows of what came of it."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._output: Any = None
        self._wanted: torch.Tensor | None = None

    def ask(self, ask: Ask, wanted: torch.Tensor) -> torch.Tensor:
        self._wanted = wanted
        return ask()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._output is None:
            self._output = self._forward(*args, **kwargs)
        output, wanted = self._output, self._wanted
        if isinstance(output, tuple):
            return (output[0][:, wanted], *output[1:])
        return replace(output, last_hidden_state=output.last_hidden_state[:, wanted])


class _Listening:
    """Takes the place of a head's forward: remembers what it is given and answers nothing of value."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self.hidden: list[torch.Tensor] = []

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.hidden.append(hidden)
        return hidden.new_zeros((*hidden.shape[:-1], self._vocabulary))


def rows_of(pack: Pack, counts: Sequence[int], piece_rows: int) -> list[torch.Tensor]:
    """Rows of the last `counts[i]` tokens of each span, in the order in which they were packed, in pieces of a span."""
    last_rows = dict(zip(pack.order, pack.last_rows.tolist(), strict=True))
    spans = [torch.arange(last_rows[index] - count + 1, last_rows[index] + 1) for index, count in enumerate(counts)]
    return [piece.to(pack.input_ids.device) for span in spans for piece in torch.split(span, piece_rows)]


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward", None)  # the class has it
        else:
            module.forward = before
