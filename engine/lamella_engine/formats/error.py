"""How much a format changes a weight, measured by packing and expanding it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lamella_engine.formats.format import Format, leading, packed_bytes, row_chunks

_AT_ONCE = 1 << 22  # numbers


class PackingError(NamedTuple):
    """What packing costs and saves; adds up over the weights of a model.

    Attributes:
        squared_error: sum of squared differences.
        squared_weight: sum of squared numbers.
        full_bytes: before packing.
        packed_bytes: after packing.
    """

    squared_error: float
    squared_weight: float
    full_bytes: int
    packed_bytes: int

    @property
    def relative(self) -> float:
        """Root mean square of the differences, relative to that of the numbers; 0 for a weight of zeros."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else 0.0

    def plus(self, other: PackingError) -> PackingError:
        """Both together."""
        return PackingError(
            self.squared_error + other.squared_error,
            self.squared_weight + other.squared_weight,
            self.full_bytes + other.full_bytes,
            self.packed_bytes + other.packed_bytes,
        )


def packing_error(format: Format, tensor: torch.Tensor) -> PackingError:
    """Pack a weight, expand it in float32 and compare, some rows at a time.

    Raises:
        OptionError: the format does not take it.
        CheckpointError: it holds numbers that the format cannot express.
    """
    parts = format.encode(tensor)
    entries = leading(tuple(tensor.shape))[0]
    numbers = tensor.reshape(entries, -1)
    error = weight = 0.0
    for chunk in row_chunks(entries, numbers.shape[1], _AT_ONCE):
        full = numbers[chunk].to(torch.float32)
        shape = (chunk.stop - chunk.start, *tensor.shape[1:]) if tensor.dim() > 1 else tuple(tensor.shape)
        expanded = torch.empty(shape, dtype=torch.float32, device=tensor.device)
        format.decode(format.slice_rows(parts, chunk.start, chunk.stop), expanded)
        error += float((expanded.view_as(full) - full).square().sum(dtype=torch.float64))
        weight += float(full.square().sum(dtype=torch.float64))
    return PackingError(error, weight, tensor.nbytes, packed_bytes(parts))
