"""What every packed format of weights can do: say whether it takes a tensor, pack it, and expand it where it is needed.

Owns the interface and how a tensor is seen (rows of numbers along its last dimension). Knows nothing of shards,
streams or models: tensors in, tensors out. Neighbours: `registry` finds a format by its name, `quant_spec` says which
tensor gets which.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from lamella_engine.errors import OptionError

Shape = tuple[int, ...]
Parts = Mapping[str, torch.Tensor]

FULL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What is packed, and what is expanded to."""


class PartSpec(NamedTuple):
    """One of the tensors that a packed weight consists of."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the part's data."""
        return math.prod(self.shape) * self.dtype.itemsize


class Format(ABC):
    """A way to store a weight in fewer bytes.

    A weight of shape [..., columns] is packed row by row: nothing of one row is needed to expand another, except what
    `slice_rows` carries along. So a stack of experts [experts, rows, columns] can be read and expanded expert by
    expert, a matrix row block by row block, and a vector is one row. Parts are contiguous tensors; those of weights
    with three or more dimensions all have the first dimension of the weight, with equal bytes for each entry.

    Expanded numbers are the same on every device, bit for bit.
    """

    name: str
    """As written in options and in shards."""
    has_fixed_size: bool
    """Whether `packed_parts` is exact; otherwise it is the most, and what it is shows after `encode`."""

    @abstractmethod
    def check(self, shape: Shape, dtype: torch.dtype) -> None:
        """Say whether such a weight can be packed.

        Raises:
            OptionError: it cannot; the message says why, and what to choose instead.
        """

    @abstractmethod
    def packed_parts(self, shape: Shape, dtype: torch.dtype) -> dict[str, PartSpec]:
        """The parts that a weight is packed into, by suffix; see `has_fixed_size`.

        Raises:
            OptionError: as `check`.
        """

    @abstractmethod
    def encode(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pack a weight on the device it is on.

        Returns:
            The parts, by suffix.

        Raises:
            OptionError: as `check`.
            CheckpointError: it holds numbers that the format cannot express.
        """

    @abstractmethod
    def decode(self, parts: Parts, out: torch.Tensor) -> None:
        """Expand into `out`, on the device that both are on; nothing waits for the device.

        Args:
            parts: as `encode` made them, or `slice_rows` of these.
            out: contiguous, of the weight's shape (or of the rows taken), bfloat16, float16 or float32.
        """

    @abstractmethod
    def slice_rows(self, parts: Parts, start: int, stop: int) -> dict[str, torch.Tensor]:
        """The parts of entries `start` to `stop` of a weight's first dimension; a vector has one. Copies nothing."""

    @abstractmethod
    def shared_parts(self, shape: Shape) -> tuple[str, ...]:
        """Parts of such a weight that all entries of its first dimension need; the others have bytes for each entry."""

    @abstractmethod
    def take_rows(self, parts: Parts, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of a matrix that is made of some rows of a weight [rows, columns], in any order; copies them.

        Args:
            parts: of the weight, on any device.
            rows: int64 [number], at least one, on the same device.
        """

    @abstractmethod
    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compile what `decode` and `matvec` need for results of `dtype`; to be called before a graph is recorded."""

    @abstractmethod
    def can_matvec(self, parts: Parts, x: torch.Tensor) -> bool:
        """Whether `matvec` takes these: a device that has a kernel for it, and one row of input."""

    @abstractmethod
    def matvec(self, parts: Parts, x: torch.Tensor, out: torch.Tensor) -> None:
        """Multiply without expanding: ``out = x @ weight.T``, with sums in float32.

        Args:
            parts: of a weight [rows, columns].
            x: [..., columns] with one row, of the type of `out`.
            out: [..., rows], contiguous.
        """


def packed_bytes(parts: Parts) -> int:
    """Bytes of all parts."""
    return sum(part.nbytes for part in parts.values())


def rows_of(shape: Shape) -> tuple[int, int]:
    """Rows and numbers in a row; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1]


def leading(shape: Shape) -> Shape:
    """What counts the rows of a weight in the shapes of its parts."""
    return shape[:-1] or (1,)


def row_chunks(rows: int, columns: int, numbers: int) -> Iterator[slice]:
    """Pieces of at most about `numbers` numbers each, whole rows."""
    step = max(1, numbers // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def check_weight(name: str, shape: Shape, dtype: torch.dtype) -> None:
    """What no format takes.

    Raises:
        OptionError: it is no array of numbers that a model computes in.
    """
    if not shape or 0 in shape:
        what = "is a single number" if not shape else f"of shape {list(shape)} holds nothing"
        raise OptionError(
            f"{name} packs rows of numbers, and a tensor that {what} has none; leave it in full precision"
        )
    if dtype not in FULL_DTYPES:
        kind = str(dtype).removeprefix("torch.")
        raise OptionError(
            f"{name} packs bfloat16, float16 and float32, not {kind}; leave the tensor as it is, or expand it first"
        )


def check_out(out: torch.Tensor, shape: Shape) -> None:
    """Refuse a place that an expanded weight does not fit.

    Raises:
        ValueError: shape, type or layout do not fit.
    """
    if out.shape[-1:] != shape[-1:] or out.numel() != math.prod(shape):
        raise ValueError(f"parts of {list(shape)} numbers do not fit into a tensor of shape {list(out.shape)}")
    if out.dtype not in FULL_DTYPES or not out.is_contiguous():
        raise ValueError(f"packed weights expand into contiguous bfloat16, float16 or float32, not {out.dtype}")
