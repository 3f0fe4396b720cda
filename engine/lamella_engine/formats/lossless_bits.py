"""bfloat16 taken apart and put together again: signs with mantissas, and exponents as codes of three bits.

Owns bits and bytes; `lossless` owns what is stored. Everything works on rows [rows, columns] and on any device.
"""

from __future__ import annotations

import torch

ESCAPE = 7
CODE_BITS = 3
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


def code_bytes(columns: int) -> int:
    """Bytes of a row's codes: three for eight numbers."""
    return -(-columns // 8) * CODE_BITS


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes of three bits, eight in three bytes: uint8 [rows, columns] -> uint8 [rows, `code_bytes`].

    Read as a number whose lowest byte is first, three bytes have number i's code in bits 3 i to 3 i + 2; missing
    numbers are zeros.
    """
    rows, columns = codes.shape
    eights = torch.nn.functional.pad(codes, (0, -columns % 8)).view(rows, -1, 8)
    words = torch.zeros(eights.shape[:2], dtype=torch.int32, device=codes.device)
    for number in range(8):
        words |= eights[..., number].to(torch.int32) << (CODE_BITS * number)
    return words[..., None].view(torch.uint8)[..., :CODE_BITS].reshape(rows, -1)


class Codebook:
    """Turns codes into exponents, four at a time: twelve bits are looked up and give four bytes.

    Args:
        book: uint8 [8], the exponent of each code; that of `ESCAPE` is not used.
    """

    def __init__(self, book: torch.Tensor) -> None:
        four = torch.arange(1 << 12, device=book.device)[:, None] >> torch.arange(0, 12, CODE_BITS, device=book.device)
        self._exponents = book[four & ESCAPE].view(torch.int32).view(-1)
        self._escapes = (four & ESCAPE == ESCAPE).to(torch.uint8).view(torch.int32).view(-1)

    def exponents(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Exponents of packed codes, and which of them are escapes.

        Args:
            packed: uint8 [rows, bytes].

        Returns:
            uint8 and bool, both [rows, 8 / 3 * bytes].
        """
        rows = packed.shape[0]
        low, middle, high = packed.view(-1, CODE_BITS).unbind(dim=-1)
        words = torch.empty(low.shape, dtype=torch.int64, device=packed.device).copy_(low)
        words |= middle.to(torch.int64) << 8
        words |= high.to(torch.int64) << 16
        # The lower twelve of 24 bits in the lower half of 64 bits, the upper twelve in the upper half.
        words |= words << 20
        words &= 0x0000_0FFF_0000_0FFF
        fours = words.view(torch.int32)
        exponents, escapes = (table.index_select(0, fours) for table in (self._exponents, self._escapes))
        return exponents.view(torch.uint8).view(rows, -1), escapes.view(torch.bool).view(rows, -1)
