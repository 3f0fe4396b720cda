"""Weights that are multiplied by a grid of scales: one a tensor, a row, a group of columns or a rectangular block.

Owns how a grid lies over a matrix and the multiplication; the formats say what their values and scales mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lamella_engine.errors import CheckpointError

Block = tuple[int, int]  # rows, columns that share a scale
_CHUNK_ELEMENTS = 1 << 24  # expanded at a time, in float32


def fit_grid(name: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], block: Block | None) -> Block:
    """The block of `shape` that each scale of `scale_shape` multiplies.

    Args:
        name: of the weight, for messages.
        shape: of the weight; matrices lie in its last two dimensions.
        scale_shape: of the scales, as `as_grid` makes them.
        block: what the settings say, the last block of a side cut short; None: the grid divides the weight evenly.

    Raises:
        CheckpointError: the grid does not cover the weight.
    """
    if len(shape) < 2 or len(scale_shape) != len(shape) or shape[:-2] != scale_shape[:-2]:
        raise _misfit(name, shape, scale_shape, block)
    (rows, columns), (grid_rows, grid_columns) = shape[-2:], scale_shape[-2:]
    if block is not None:
        if (grid_rows, grid_columns) != (-(-rows // block[0]), -(-columns // block[1])):
            raise _misfit(name, shape, scale_shape, block)
        return block
    if not grid_rows or not grid_columns or rows % grid_rows or columns % grid_columns:
        raise _misfit(name, shape, scale_shape, block)
    return rows // grid_rows, columns // grid_columns


def as_grid(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The grid that scales of `scale_shape` form over a weight of `shape`: one number, or one a row, become columns."""
    if len(shape) == 2 and scale_shape in ((), (1,)):
        return (1, 1)
    if len(shape) == 2 and scale_shape == shape[:1]:
        return (shape[0], 1)
    return scale_shape


def multiply(
    values: torch.Tensor,
    scales: torch.Tensor,
    block: Block,
    dtype: torch.dtype,
    *,
    zeros: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    through: torch.dtype | None = None,
) -> torch.Tensor:
    """(values - zeros) * scales, a few rows at a time.

    Args:
        values: [..., rows, columns], any type; exact in float32.
        scales: [..., grid rows, grid columns]; uint8 and float8_e8m0fnu are exponents of two.
        block: rows and columns that share a scale.
        dtype: of the result; products are rounded to it once.
        zeros: like `scales`, whole numbers.
        groups: int64 [columns], the grid column of each column, where these are out of order.
        through: a type that products are rounded to before, where the format's reference computes in it.

    Returns:
        [..., rows, columns] of `dtype`.
    """
    *_, rows, columns = values.shape
    matrices = values.reshape(-1, rows, columns)
    grids = _as_numbers(scales).reshape(-1, *scales.shape[-2:])
    zero_grids = None if zeros is None else zeros.to(torch.float32).reshape(grids.shape)
    spread = _Spread(columns, block[1], scales.shape[-1], groups)
    result = torch.empty(matrices.shape, dtype=dtype)
    for index in range(matrices.shape[0]):
        for part in row_parts(rows, columns):
            of_row = torch.arange(part.start, part.stop) // block[0]
            part_values = spread.split(matrices[index, part].to(torch.float32))
            if zero_grids is not None:
                part_values = part_values - spread.over(zero_grids[index, of_row])
            part_values = part_values * spread.over(grids[index, of_row])
            part_values = part_values.reshape(-1, columns)
            result[index, part] = part_values if through is None else part_values.to(through)
    return result.reshape(values.shape)


def row_parts(rows: int, columns: int) -> Iterator[slice]:
    """Pieces of a matrix that are small enough to be held in float32."""
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


class _Spread:
    """Brings rows of numbers and rows of scales to shapes that multiply; without copying scales where groups are even.

    Args:
        columns: of the numbers.
        width: numbers under one scale.
        scales: in a row.
        groups: the scale of each column, where they are out of order.
    """

    def __init__(self, columns: int, width: int, scales: int, groups: torch.Tensor | None) -> None:
        self._is_even = groups is None and width * scales == columns
        self._scales = scales
        self._of_column = torch.arange(columns) // width if groups is None else groups

    def split(self, numbers: torch.Tensor) -> torch.Tensor:
        """[rows, columns] -> [rows, scales, width] where groups are even."""
        return numbers.reshape(numbers.shape[0], self._scales, -1) if self._is_even else numbers

    def over(self, grid: torch.Tensor) -> torch.Tensor:
        """[rows, scales] -> what `split` numbers are multiplied with."""
        if self._is_even:
            return grid[..., None]
        return grid if self._scales == 1 else grid[:, self._of_column]


def _as_numbers(scales: torch.Tensor) -> torch.Tensor:
    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scales.shape), scales.to(torch.int32) - 127)
    return scales.to(torch.float32)


def _misfit(name: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], block: Block | None) -> CheckpointError:
    told = f" in blocks of {block[0]}x{block[1]}" if block is not None else ""
    return CheckpointError(
        f"the scales of {name!r} do not fit it: weight {list(shape)}, scales {list(scale_shape)}{told}. The settings "
        "and the weights do not belong together; fetch the checkpoint again"
    )
