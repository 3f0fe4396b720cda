"""Numbers of 1 to 8 bits packed densely into 32-bit words, the lowest bits first; a number may reach over two words."""

from __future__ import annotations

import torch

from lamella_engine.dequantise.scale_grid import row_parts

WORD_BITS = 32


def words_for(count: int, bits: int) -> int:
    """How many words hold `count` numbers of `bits` bits."""
    return -(-count * bits // WORD_BITS)


def unpack_columns(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Unpack along the last dimension.

    Args:
        words: int32 [rows, `words_for` columns].
        bits: of each number, 1 to 8.
        columns: numbers in each row.

    Returns:
        uint8 [rows, columns].
    """
    rows = words.shape[0]
    if bits == 8:
        return words.contiguous().view(torch.uint8)[:, :columns]
    if bits == 4:
        pairs = words.contiguous().view(torch.uint8)
        return torch.stack((pairs & 15, pairs >> 4), dim=-1).reshape(rows, -1)[:, :columns]
    numbers = torch.empty((rows, columns), dtype=torch.uint8)
    for part in row_parts(rows, columns):
        numbers[part] = _unpack(words[part], bits, columns)
    return numbers


def unpack_rows(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Unpack along the first dimension: int32 [`words_for` rows, columns] -> uint8 [rows, columns]."""
    return unpack_columns(words.t(), bits, rows).t()


def _unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    first_bit = torch.arange(columns) * bits
    word, shift = first_bit // WORD_BITS, first_bit % WORD_BITS
    wide = words.to(torch.int64) & 0xFFFFFFFF
    following = torch.clamp(word + 1, max=words.shape[1] - 1)
    # Of a number that ends in its word, the bits that the next word would add are cut off by the mask.
    joined = (wide[:, word] >> shift) | (wide[:, following] << (WORD_BITS - shift))
    return (joined & ((1 << bits) - 1)).to(torch.uint8)
