"""An output head that does not stay on the device: its rows pass by in blocks, after the last layer of each sweep."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear

from lamella_engine.binding import tensor_view
from lamella_engine.pieces import head_rows
from lamella_engine.shard import TensorSpec
from lamella_engine.weight_stream import WeightStream


class StreamedHead:
    """Takes the place of `head`'s forward: logits of `num_blocks` row blocks, pieces `first_piece` onwards.

    Args:
        head: the module, its weight on meta; a bias stays with it.
        spec: the weight, [vocabulary, width], as stored.
        num_blocks: row blocks, as `pieces.head_blocks` cuts them.
        first_piece: number of the first one in sweep order.
        stream: where they come from.
        buffer: where a block is converted to the compute dtype, uint8; None where it is stored in that.
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
        self._blocks = []
        row_bytes = spec.nbytes // spec.shape[0]
        for low, high in head_rows(spec.shape[0], num_blocks):
            shape = (high - low, *spec.shape[1:])
            self._blocks.append((low, high, TensorSpec(spec.name, spec.dtype, shape, 0, (high - low) * row_bytes)))

    @property
    def vocabulary(self) -> int:
        """Rows of all blocks."""
        return self._blocks[-1][1]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [..., width] -> logits [..., vocabulary]."""
        logits = hidden.new_empty((*hidden.shape[:-1], self.vocabulary))
        self.fill(hidden, logits)
        return logits

    def fill(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Write the logits of `hidden` [..., width] to `logits` [..., vocabulary], on whatever device that is."""
        for number, (low, high, spec) in enumerate(self._blocks, self._first_piece):
            slot = self._stream.acquire(number)
            weight = self._in_dtype(tensor_view(slot.tensor, spec), hidden.dtype)
            bias = None if self._bias is None else self._bias[low:high]
            logits[..., low:high] = linear(hidden, weight, bias)
            self._stream.release(number)

    def _in_dtype(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if stored.dtype == dtype:
            return stored
        assert self._buffer is not None, "a plan that converts has room for it"
        converted = self._buffer[: stored.numel() * dtype.itemsize].view(dtype).view(stored.shape)
        return converted.copy_(stored)
