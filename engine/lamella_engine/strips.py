"""Rows of a packed table, cut into strips: which rows each has.

A table outside the layers is too large to be packed, moved or expanded whole: as a head it may pass the device in row
blocks, as an embedding its rows are looked up one by one. So its rows are packed strip by strip, each strip a matrix of
its own, whatever the format. `packed_shard` writes strips, `streamed_head` expands runs of them, `embedding_rows` takes
rows from them.
"""

from __future__ import annotations

from typing import NamedTuple

STRIP_NUMBERS = 1 << 21  # about: some MiB, so that a kernel has enough to do and a buffer is small beside a layer
_ROWS = 64  # a multiple of it, so that parts with a byte a row need no padding behind them


class Rows(NamedTuple):
    """Rows `low` to `high - 1` of a table."""

    low: int
    high: int


def strip_rows(shape: tuple[int, ...]) -> list[Rows]:
    """The rows of each strip of a tensor; what is no matrix is one strip of all its first dimension."""
    num_rows = shape[0]
    if len(shape) != 2:
        return [Rows(0, num_rows)]
    step = max(_ROWS, STRIP_NUMBERS // max(1, shape[1]) // _ROWS * _ROWS)
    return [Rows(low, min(low + step, num_rows)) for low in range(0, num_rows, step)]
