"""One byte for the scale of each block: three bits of exponent above its row's, and five bits of mantissa.

A row's exponent lies so that its largest scale has the largest of the eight exponents. The scale's bits in float32 are
``((row exponent << 5) + byte) << 18``: sums and shifts, so every device expands it alike. A block whose scale is less
than 1/255 of its row's largest takes the smallest one there is; its numbers are small beside the row's and lose
accordingly.
"""

from __future__ import annotations

import torch

from lamella_engine.formats.format import PartSpec, Shape, leading

BLOCK = 64
"""Numbers that share a scale; the last block of a row may be shorter."""
SCALES, EXPONENTS = "scales", "exponents"

_SHIFT = 18  # float32 has 23 bits of mantissa, of which five are kept
_SPAN = 255
_MAX_KEPT = (254 << 5) + 31  # the largest finite number with five bits of mantissa
_HIGHEST = 7  # of the eight exponents of a row
_LOWEST_EXPONENT = 16  # scales of at least 2 ** -111, so that a scale's inverse is finite, and so is a multiple of it


def blocks_in(columns: int) -> int:
    """Blocks in a row."""
    return -(-columns // BLOCK)


def scale_parts(shape: Shape) -> dict[str, PartSpec]:
    """Parts of the scales of a weight."""
    lead = leading(shape)
    return {
        SCALES: PartSpec((*lead, blocks_in(shape[-1])), torch.uint8),
        EXPONENTS: PartSpec(lead, torch.uint8),
    }


def kept_bits(wanted: torch.Tensor, *, is_rounded_up: bool) -> torch.Tensor:
    """The upper 14 bits of scales, rounded.

    Args:
        wanted: float32, finite, not negative.
        is_rounded_up: never below what is wanted, otherwise to the nearest.

    Returns:
        int32, like `wanted`.
    """
    bits = wanted.contiguous().view(torch.int32)
    rounding = (1 << _SHIFT) - 1 if is_rounded_up else 1 << (_SHIFT - 1)
    return ((bits + rounding) >> _SHIFT).clamp(max=_MAX_KEPT)


def row_exponents(kept: torch.Tensor) -> torch.Tensor:
    """Of each row of `kept_bits` [rows, blocks], the exponent that its largest scale fits under: int32 [rows, 1]."""
    return ((kept.amax(dim=-1, keepdim=True) >> 5) - _HIGHEST).clamp(min=_LOWEST_EXPONENT)


def scale_bytes(kept: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Int32 [rows, blocks], the bytes that come nearest to `kept_bits` under the rows' exponents."""
    return (kept - (exponents << 5)).clamp(0, _SPAN)


def scale_values(scales: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """What bytes stand for.

    Args:
        scales: [rows, blocks], uint8 or int32.
        exponents: [rows, 1], uint8 or int32.

    Returns:
        float32 [rows, blocks].
    """
    kept = (exponents.to(torch.int32) << 5) + scales.to(torch.int32)
    return (kept << _SHIFT).view(torch.float32)
