"""nf4 and fp4: four-bit codes, two a byte, the first of two numbers in the upper half, as bitsandbytes packs them.

The scale of a block is not its absolute maximum but, of six between it and 0.8 of it, the one with the least squared
error: expanding costs the same, and errors are 8 % smaller.
"""

from __future__ import annotations

import torch

from lamella_engine.formats.block_kernel import BlockKernel
from lamella_engine.formats.blockwise import Blockwise
from lamella_engine.formats.codes import FP4, NF4
from lamella_engine.formats.scales import kept_bits, row_exponents, scale_bytes, scale_values

_BELOW_MAXIMUM = (0, 2, 4, 6, 8, 10)  # steps of a scale's byte, each 1.6 to 3.1 %
_FINE = 4096  # places between 0 and 1 at which the nearest number is looked up instead of searched
_REACH = 3 * _FINE // 2  # numbers reach 1.34 of the smallest scale
_CPU = torch.device("cpu")


class FourBit(Blockwise):
    """Sixteen numbers between -1 and 1, times the scale of a block."""

    def __init__(self, name: str, table: tuple[float, ...]) -> None:
        self.name = name
        self._kernel = BlockKernel(name, table)
        numbers = torch.tensor(table, dtype=torch.float32)
        places = torch.arange(-_REACH, _REACH + 1, dtype=torch.float32) / _FINE
        nearest = (places[:, None] - numbers).abs().argmin(dim=-1)
        self._codes = {_CPU: nearest.to(torch.uint8)}  # at each place, the code of the nearest number
        self._nearest = {_CPU: numbers[nearest] * _FINE}  # and that number
        pairs = torch.stack((numbers.repeat_interleave(16), numbers.repeat(16)), dim=-1)
        self._pairs = {_CPU: pairs}  # of each byte, its two numbers

    @property
    def kernel(self) -> BlockKernel:
        """See `Blockwise.kernel`."""
        return self._kernel

    def code_bytes(self, columns: int) -> int:
        """See `Blockwise.code_bytes`."""
        return -(-columns // 2)

    def encode_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Blockwise.encode_blocks`."""
        kept = kept_bits(blocks.abs().amax(dim=-1), is_rounded_up=False)
        exponents = row_exponents(kept)
        best = self.choose_scales(blocks, kept, exponents)
        codes, _ = self.round_to_codes(blocks, scale_values(best, exponents)[..., None])
        return pack_codes(codes), best, exponents

    def choose_scales(
        self, blocks: torch.Tensor, kept: torch.Tensor, exponents: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of some scales below the maximum, the one for each block with the least squared error.

        Args:
            blocks: float32 [rows, blocks, 64].
            kept: `kept_bits` of the largest number of each block, [rows, blocks].
            exponents: of the rows, [rows, 1].
            weights: how much the square of each number's error counts, like `blocks`; None means alike.

        Returns:
            Bytes of scales, int32 [rows, blocks].
        """
        nearest = _on(self._nearest, blocks.device)
        root = None if weights is None else weights.sqrt()
        best = error = None
        for steps in _BELOW_MAXIMUM:
            candidate = scale_bytes(kept - steps, exponents)
            scale = scale_values(candidate, exponents)
            places = blocks * (_FINE / scale)[..., None]
            found = nearest.index_select(0, _indices(places).view(-1)).view_as(places).sub_(places)
            own = torch.linalg.vector_norm(found if root is None else found.mul_(root), dim=-1).mul_(scale)
            is_better = own < error if error is not None else torch.ones_like(own, dtype=torch.bool)
            best = candidate if best is None else torch.where(is_better, candidate, best)
            error = own if error is None else torch.minimum(own, error)
        assert best is not None
        return best

    def round_to_codes(self, numbers: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes that come nearest to float32 `numbers` under `scale`, and what they stand for; shapes broadcast."""
        places = _indices(numbers * (_FINE / scale)).view(-1)
        codes = _on(self._codes, numbers.device).index_select(0, places).view_as(numbers)
        values = _on(self._nearest, numbers.device).index_select(0, places).view_as(numbers) * (scale / _FINE)
        return codes, values

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """See `Blockwise.values`."""
        pairs = _on(self._pairs, codes.device)
        return pairs.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape[0], -1)

    def move_tables(self, device: torch.device) -> None:
        """See `Blockwise.move_tables`."""
        _on(self._pairs, device)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte: uint8 [rows, blocks, 64] -> uint8 [rows, half as many]."""
    halves = codes.view(codes.shape[0], -1, 2)
    return (halves[..., 0] << 4) | halves[..., 1]


def _indices(places: torch.Tensor) -> torch.Tensor:
    """Places in the tables; a number beyond the largest code, as feedback can make one, takes that."""
    return (places.clamp(-_REACH, _REACH) + (_REACH + 0.5)).to(torch.int32)


def _on(table: dict[torch.device, torch.Tensor], device: torch.device) -> torch.Tensor:
    """A table where it is needed; moved there once."""
    return table[device] if device in table else table.setdefault(device, table[_CPU].to(device))


def nf4() -> FourBit:
    """Codes that suit normally distributed weights."""
    return FourBit("nf4", NF4)


def fp4() -> FourBit:
    """Codes that are small floating point numbers."""
    return FourBit("fp4", FP4)
