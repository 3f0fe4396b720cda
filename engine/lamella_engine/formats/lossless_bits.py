"""bfloat16 taken apart and put together again: signs with mantissas, and exponents as codes in three bit planes.

Owns bits and bytes; `lossless` owns what is stored. Everything works on rows [rows, columns] and on any device.
"""

from __future__ import annotations

import functools

import torch

ESCAPE = 7
PLANES = 3
_SIGN_AND_MANTISSA = 0x807F - 0x10000  # as int16


def take_apart(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bfloat16 -> signs with mantissas (a byte: the sign, then seven bits), and exponents (a byte), both uint8."""
    bits = numbers.view(torch.int16)
    mantissas = ((bits >> 8) & 0x80) | (bits & 0x7F)
    return mantissas.to(torch.uint8), ((bits >> 7) & 0xFF).to(torch.uint8)


def put_together(mantissas: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """What `take_apart` took apart."""
    bits = mantissas.view(torch.int8).to(torch.int16)  # repeats the sign in the upper byte
    bits &= _SIGN_AND_MANTISSA
    bits |= exponents.to(torch.int16) << 7
    return bits.view(torch.bfloat16)


def pack_planes(codes: torch.Tensor) -> torch.Tensor:
    """Codes of three bits as bit planes: uint8 [rows, columns] -> uint8 [rows, 3, columns / 8, rounded up].

    Bit i of byte j of a plane belongs to number 8 j + i; missing numbers are zeros.
    """
    rows, columns = codes.shape
    eights = torch.nn.functional.pad(codes, (0, -columns % 8)).view(rows, -1, 8)
    planes = torch.zeros((rows, PLANES, eights.shape[1]), dtype=torch.uint8, device=codes.device)
    for plane in range(PLANES):
        for number in range(8):
            planes[:, plane] |= ((eights[..., number] >> plane) & 1) << number
    return planes


class Codebook:
    """Turns codes into exponents eight at a time: a byte of a plane becomes eight bytes of one 64-bit word.

    An exponent is a polynomial of its code's three bits over bits (exclusive or of products), so that bytes are looked
    up once a plane and everything else is arithmetic on whole words.

    Args:
        book: uint8 [8], the exponent of each code; that of `ESCAPE` is 0.
    """

    def __init__(self, book: torch.Tensor) -> None:
        terms = book.to(torch.int64)
        for bit in (1, 2, 4):
            without = torch.arange(8, device=book.device) & ~bit
            has_bit = torch.arange(8, device=book.device) & bit != 0
            terms = torch.where(has_bit, terms ^ terms[without], terms)
        self._terms = terms

    def exponents(self, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Exponents of codes, and which of them are escapes.

        Args:
            planes: uint8 [rows, 3, bytes].

        Returns:
            uint8 and bool, both [rows, 8 * bytes].
        """
        spread = _spread(planes.device)
        rows, _, width = planes.shape
        low, middle, high = (
            spread.index_select(0, planes[:, plane].reshape(-1).to(torch.int32)).view(rows, width) for plane in range(3)
        )
        words = torch.full_like(low, 0x0101010101010101) * self._terms[0]
        both = low & middle
        products = ((1, low), (2, middle), (4, high), (3, both), (5, low & high), (6, middle & high))
        for term, product in products:
            words ^= product * self._terms[term]
        is_escape = both & high
        words ^= is_escape * self._terms[ESCAPE]
        return words.view(torch.uint8), is_escape.view(torch.bool)


@functools.cache
def _spread(device: torch.device) -> torch.Tensor:
    """Of each byte, the word whose byte i is its bit i."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return bits.to(torch.uint8).view(torch.int64).reshape(-1).to(device)
