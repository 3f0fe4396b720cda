"""int8: whole numbers from -127 to 127, times the scale of a block.

Even steps, because weights are dense where a code with uneven steps (bitsandbytes' dynamic one) has its widest. A
code has seven bits and a scale six, so float32 holds their product exactly.
"""

from __future__ import annotations

import torch

from lamella_engine.formats.block_kernel import BlockKernel
from lamella_engine.formats.blockwise import Blockwise
from lamella_engine.formats.scales import kept_bits, row_exponents, scale_bytes, scale_values

_LARGEST = 127


class Int8(Blockwise):
    """Eight bits a number and a byte for each 64."""

    name = "int8"

    @property
    def kernel(self) -> BlockKernel:
        """See `Blockwise.kernel`."""
        return BlockKernel("int8")

    def code_bytes(self, columns: int) -> int:
        """See `Blockwise.code_bytes`."""
        return columns

    def encode_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Blockwise.encode_blocks`."""
        kept = kept_bits(blocks.abs().amax(dim=-1) / _LARGEST, is_rounded_up=True)
        exponents = row_exponents(kept)
        scales = scale_bytes(kept, exponents)
        steps = (blocks / scale_values(scales, exponents)[..., None]).round_().clamp_(-_LARGEST, _LARGEST)
        return steps.to(torch.int8).view(torch.uint8).view(blocks.shape[0], -1), scales, exponents

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """See `Blockwise.values`."""
        return codes.view(torch.int8)

    def move_tables(self, device: torch.device) -> None:
        """There are none."""
