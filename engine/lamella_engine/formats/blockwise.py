"""Formats that store small codes under one scale a block of a row: what the four-bit and the eight-bit ones share.

Owns shapes, scales, slices and the choice of who expands: kernels compiled here on CUDA, bitsandbytes' where it is
installed, torch otherwise. The children say what codes are.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from lamella_engine.errors import CheckpointError
from lamella_engine.formats import bitsandbytes_kernels as bitsandbytes
from lamella_engine.formats import kernels
from lamella_engine.formats.block_kernel import BlockKernel
from lamella_engine.formats.format import (
    Format,
    Parts,
    PartSpec,
    Shape,
    check_out,
    check_weight,
    leading,
    row_chunks,
    rows_of,
)
from lamella_engine.formats.scales import BLOCK, EXPONENTS, SCALES, blocks_in, scale_parts, scale_values

CODES = "codes"
_ENCODED_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 24}  # numbers: temporaries stay in the cache, or small
_DECODED_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 24}


class Blockwise(Format):
    """Codes in blocks of 64 along each row."""

    has_fixed_size = True

    def check(self, shape: Shape, dtype: torch.dtype) -> None:
        """See `Format.check`."""
        check_weight(self.name, shape, dtype)

    def packed_parts(self, shape: Shape, dtype: torch.dtype) -> dict[str, PartSpec]:
        """See `Format.packed_parts`."""
        self.check(shape, dtype)
        codes = PartSpec((*leading(shape), self.code_bytes(shape[-1])), torch.uint8)
        return {CODES: codes, **scale_parts(shape)}

    def encode(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Format.encode`."""
        shape = tuple(tensor.shape)
        parts = {
            suffix: torch.empty(spec.shape, dtype=spec.dtype, device=tensor.device)
            for suffix, spec in self.packed_parts(shape, tensor.dtype).items()
        }
        rows, columns = rows_of(shape)
        codes, scales = parts[CODES].view(rows, -1), parts[SCALES].view(rows, -1)
        exponents, numbers = parts[EXPONENTS].view(rows, 1), tensor.reshape(rows, columns)
        for chunk in row_chunks(rows, columns, _at_once(_ENCODED_AT_ONCE, tensor.device)):
            padded = torch.nn.functional.pad(numbers[chunk].to(torch.float32), (0, -columns % BLOCK))
            blocks = padded.view(-1, blocks_in(columns), BLOCK)
            self.check_finite(blocks)
            packed = self.encode_blocks(blocks)
            codes[chunk] = packed[0][:, : codes.shape[1]]
            scales[chunk], exponents[chunk] = packed[1], packed[2]
        return parts

    def check_finite(self, numbers: torch.Tensor) -> None:
        """Refuse numbers that no code stands for.

        Raises:
            CheckpointError: some are infinite, or not numbers.
        """
        if not bool(torch.isfinite(numbers).all()):
            raise CheckpointError(
                f"a weight holds infinities or not-a-numbers, which {self.name} has no code for. The checkpoint is "
                "damaged, or its tensor has to stay in full precision: give it 'full' by its name"
            )

    def decode(self, parts: Parts, out: torch.Tensor) -> None:
        """See `Format.decode`."""
        codes = parts[CODES]
        rows, columns = self._size_in(codes, out)
        if kernels.are_ready(out.device, out.dtype):
            kernels.expand_blocks(self.kernel, codes, parts[SCALES], parts[EXPONENTS], out.view(rows, columns))
        elif columns % BLOCK == 0 and bitsandbytes.can_expand(self.kernel, out):
            absmax = self._scales(parts, slice(None))
            bitsandbytes.expand(self.kernel, codes.view(rows, -1), absmax, out.view(rows, columns))
        else:
            self.decode_with_torch(parts, out)

    def decode_with_torch(self, parts: Parts, out: torch.Tensor) -> None:
        """As `decode`, by torch's own operations only: some rows at a time, on any device."""
        rows, columns = self._size_in(parts[CODES], out)
        codes, into = parts[CODES].view(rows, -1), out.view(rows, columns)
        for chunk in row_chunks(rows, columns, _at_once(_DECODED_AT_ONCE, out.device)):
            scales = self._scales(parts, chunk)
            if columns % BLOCK == 0:
                values = self.values(codes[chunk]).view(*scales.shape, BLOCK)
                torch.mul(values, scales[..., None], out=into[chunk].view(*scales.shape, BLOCK))
            else:
                of_number = scales.repeat_interleave(BLOCK, dim=1, output_size=scales.shape[1] * BLOCK)
                torch.mul(self.values(codes[chunk])[:, :columns], of_number[:, :columns], out=into[chunk])

    def slice_rows(self, parts: Parts, start: int, stop: int) -> dict[str, torch.Tensor]:
        """See `Format.slice_rows`."""
        return {suffix: part[start:stop] for suffix, part in parts.items()}

    def shared_parts(self, shape: Shape) -> tuple[str, ...]:
        """See `Format.shared_parts`; a vector is one row."""
        return () if len(shape) > 1 else (CODES, SCALES, EXPONENTS)

    def take_rows(self, parts: Parts, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Format.take_rows`."""
        return {suffix: part.index_select(0, rows) for suffix, part in parts.items()}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """See `Format.prepare`."""
        kernels.prepare(device, dtype)
        bitsandbytes.prepare(self.kernel)
        self.move_tables(device)

    def can_matvec(self, parts: Parts, x: torch.Tensor) -> bool:
        """See `Format.can_matvec`."""
        codes = parts[CODES]
        if codes.dim() != 2 or x.numel() != x.shape[-1] or codes.shape[-1] != self.code_bytes(x.shape[-1]):
            return False
        if kernels.are_ready(x.device, x.dtype):
            return kernels.can_multiply(codes, x)
        return x.shape[-1] % BLOCK == 0 and bitsandbytes.can_multiply(self.kernel, x)

    def matvec(self, parts: Parts, x: torch.Tensor, out: torch.Tensor) -> None:
        """See `Format.matvec`."""
        if not self.can_matvec(parts, x):
            raise ValueError(
                f"no kernel multiplies {list(x.shape)} {x.dtype} on {x.device} with {self.name}; expand it"
            )
        codes = parts[CODES]
        if out.numel() != codes.shape[0] or out.dtype != x.dtype or not out.is_contiguous():
            raise ValueError(f"{codes.shape[0]} results of {x.dtype} do not fit into {list(out.shape)} {out.dtype}")
        if kernels.are_ready(x.device, x.dtype):
            kernels.multiply(self.kernel, codes, parts[SCALES], parts[EXPONENTS], x, out)
        else:
            bitsandbytes.multiply(self.kernel, codes, self._scales(parts, slice(None)), x, out)

    @property
    @abstractmethod
    def kernel(self) -> BlockKernel:
        """What its kernels are called."""

    @abstractmethod
    def code_bytes(self, columns: int) -> int:
        """Bytes of a row's codes."""

    @abstractmethod
    def encode_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pack float32 [rows, blocks, 64].

        Returns:
            Codes as bytes [rows, ...], bytes of scales [rows, blocks], exponents [rows, 1].
        """

    @abstractmethod
    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The numbers before scaling: uint8 [rows, code bytes] -> a tensor of numbers [rows, at least columns]."""

    @abstractmethod
    def move_tables(self, device: torch.device) -> None:
        """Have the tables that `values` uses on `device`."""

    def _size_in(self, codes: torch.Tensor, out: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of `out` as these codes fill it."""
        rows, columns = codes.numel() // codes.shape[-1], out.shape[-1] if out.dim() else 0
        check_out(out, (rows, columns))
        if self.code_bytes(columns) != codes.shape[-1]:
            raise ValueError(f"{codes.shape[-1]} bytes of {self.name} codes are no row of {columns} numbers")
        return rows, columns

    def _scales(self, parts: Parts, chunk: slice) -> torch.Tensor:
        scales = parts[SCALES]
        rows = scales.numel() // scales.shape[-1]
        return scale_values(scales.view(rows, -1)[chunk], parts[EXPONENTS].view(rows, 1)[chunk])


def _at_once(numbers: dict[str, int], device: torch.device) -> int:
    return numbers["cpu" if device.type == "cpu" else "cuda"]
