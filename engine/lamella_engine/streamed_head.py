"""An output head that is not ready to compute with: its rows pass by in blocks, after the last layer of each sweep.

Blocks wait in RAM or on disk, or stay on the device packed. What is packed or of another type is expanded into a buffer
that the layers use as well, as many strips at a time as it has room for. Neighbours: `pieces` cuts the head,
`weight_stream` brings its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from lamella_engine.binding import TORCH_DTYPES, tensor_view
from lamella_engine.formats import Format, find_format
from lamella_engine.pieces import HeadBlock, cut_head
from lamella_engine.shard import TensorSpec
from lamella_engine.weight_stream import BoundSlot, WeightStream


class _Expansion(NamedTuple):
    """A strip in a buffer, and the rows of another buffer that it is expanded into."""

    format: Format
    parts: dict[str, torch.Tensor]
    target: torch.Tensor


class _Run(NamedTuple):
    """Some rows of the head as they are multiplied with, from row `low` on, and what has to be expanded before."""

    low: int
    weight: torch.Tensor
    source: torch.Tensor | None
    strips: list[_Expansion]

    def make_ready(self) -> torch.Tensor:
        """The weight, in the type that computes."""
        if self.source is not None:
            self.weight.copy_(self.source)
        for format, parts, target in self.strips:
            format.decode(parts, target)
        return self.weight


class StreamedHead:
    """Takes the place of `head`'s forward: logits of `num_blocks` row blocks, pieces `first_piece` onwards.

    Args:
        head: the module, its weight on meta; a bias stays with it.
        spec: the weight, [vocabulary, width], as stored.
        num_blocks: row blocks, as `pieces.cut_head` cuts them.
        first_piece: number of the first one in sweep order.
        stream: where they come from.
        buffer: where rows are brought to the compute dtype, uint8; None where they are stored in that.
    """

    def __init__(
        self,
        head: nn.Module,
        spec: TensorSpec,
        num_blocks: int,
        first_piece: int,
        stream: WeightStream,
        buffer: torch.Tensor | None,
    ) -> None:
        self._bias = getattr(head, "bias", None)
        self._first_piece = first_piece
        self._stream = stream
        self._buffer = buffer
        assert isinstance(head.weight, torch.Tensor), "a head multiplies with its weight"
        self._dtype = head.weight.dtype
        self._blocks = cut_head(spec, num_blocks)
        self._runs: dict[tuple[int, tuple[str, int]], list[_Run]] = {}
        if spec.packed is not None:
            assert buffer is not None, "a plan that expands has room for it"
            find_format(spec.packed.format).prepare(buffer.device, self._dtype)

    @property
    def vocabulary(self) -> int:
        """Rows of all blocks."""
        return self._blocks[-1].high

    @property
    def pieces(self) -> range:
        """The numbers of its blocks in sweep order."""
        return range(self._first_piece, self._first_piece + len(self._blocks))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [..., width] -> logits [..., vocabulary]."""
        logits = hidden.new_empty((*hidden.shape[:-1], self.vocabulary))
        self.fill(hidden, logits)
        return logits

    def fill(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Write the logits of `hidden` [..., width] to `logits` [..., vocabulary], on whatever device that is."""
        for number in self.pieces:
            for run in self._runs_in(number, self._stream.acquire(number)):
                high = run.low + run.weight.shape[0]
                bias = None if self._bias is None else self._bias[run.low : high]
                logits[..., run.low : high] = linear(hidden, run.make_ready(), bias)
            self._stream.release(number)

    def expand(self, number: int, slot: BoundSlot) -> None:
        """Bring block `number` in `slot` to the compute type, and leave it at that."""
        for run in self._runs_in(number, slot):
            run.make_ready()

    def close(self) -> None:
        """Let go of the buffer and of all blocks; idempotent."""
        self._runs.clear()
        self._buffer = None

    def _runs_in(self, number: int, slot: BoundSlot) -> list[_Run]:
        """The runs of a block; kept by buffer, so that a steady sweep makes no views."""
        key = (number, slot.key)
        if key not in self._runs:
            block = self._blocks[number - self._first_piece]
            is_packed = block.tensors[0].packed is not None
            make = self._packed_runs if is_packed else self._plain_run
            self._runs[key] = list(make(block, slot.tensor))
        return self._runs[key]

    def _plain_run(self, block: HeadBlock, data: torch.Tensor) -> Iterator[_Run]:
        stored = tensor_view(data, block.tensors[0])
        if stored.dtype == self._dtype:
            yield _Run(block.low, stored, None, [])
        else:
            yield _Run(block.low, self._room(tuple(stored.shape)), stored, [])

    def _packed_runs(self, block: HeadBlock, data: torch.Tensor) -> Iterator[_Run]:
        assert self._buffer is not None, "a plan that expands has room for it"
        low = block.low
        for strips in self._fitting(block.tensors, self._buffer.numel() // self._dtype.itemsize):
            rows = [strip.shape[0] for strip in strips]
            weight = self._room((sum(rows), *strips[0].shape[1:]))
            expansions = []
            for strip, target in zip(strips, torch.split(weight, rows), strict=True):
                assert strip.packed is not None, "strips are packed"
                parts = {part.name: tensor_view(data, part) for part in strip.packed.parts}
                expansions.append(_Expansion(find_format(strip.packed.format), parts, target))
            yield _Run(low, weight, None, expansions)
            low += sum(rows)

    @staticmethod
    def _fitting(strips: Sequence[TensorSpec], numbers: int) -> Iterator[list[TensorSpec]]:
        """Strips one after the other, as many at a time as have at most so many numbers; one at least."""
        run: list[TensorSpec] = []
        taken = 0
        for strip in strips:
            own = strip.shape[0] * strip.shape[1]
            if run and taken + own > numbers:
                yield run
                run, taken = [], 0
            run.append(strip)
            taken += own
        yield run

    def _room(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The beginning of the buffer as a weight of that shape."""
        assert self._buffer is not None, "a plan that converts has room for it"
        numbers = shape[0] * shape[1]
        return self._buffer[: numbers * self._dtype.itemsize].view(self._dtype).view(shape)


def conversion_bytes(spec: TensorSpec, num_blocks: int, dtype: torch.dtype) -> int:
    """Room that the head `spec` in so many blocks needs to be brought to `dtype`; 0 if it is stored in that."""
    if spec.packed is not None:
        rows = max(strip.shape[0] for strip in spec.packed.strips)
    elif TORCH_DTYPES[spec.dtype] != dtype:
        rows = -(-spec.shape[0] // num_blocks)
    else:
        return 0
    return rows * spec.shape[1] * dtype.itemsize
