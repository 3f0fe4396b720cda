"""Brings weights that stay to their home once, when a model is opened.

Owns the one-time reads: into device memory, into the RAM tier, converted to the compute dtype where that differs.
`weight_stream` moves what does not stay.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from lamella_engine.binding import LayerBinding
from lamella_engine.file_reads import ReadStyle, read_piece
from lamella_engine.host_memory import HostMemory
from lamella_engine.pieces import Piece, tensor_piece
from lamella_engine.ram_tier import RamTier
from lamella_engine.shard import Shard, TensorSpec
from lamella_engine.weight_stream import BoundSlot

BOUNCE_BYTES = 64 * 1024 * 1024  # read and copied to the device at a time


class Loader:
    """Reads pieces for good; not thread-safe.

    Attributes:
        device: where what is computed with goes.
        tier: the RAM tier, closed by its owner.
    """

    def __init__(self, device: torch.device, tier: RamTier, style: ReadStyle) -> None:
        self.device = device
        self.tier = tier
        self._style = style

    def to_device(self, key: int, piece: Piece, binding: LayerBinding | None, target: torch.Tensor) -> BoundSlot:
        """The piece in device memory for good, in the compute dtype of `binding`, or as stored without one.

        Args:
            key: tells it from other resident pieces that `binding` is given.
            piece: what is read.
            binding: its places in the model; None leaves what is packed packed.
            target: where it is kept, uint8 [`resident_bytes`].

        Raises:
            ShardError: it cannot be read.
        """
        if binding is not None and binding.needs_conversion:
            with HostMemory(piece.nbytes) as stored:
                read_piece(piece, stored.view, self._style)
                binding.convert(stored.tensor, target)
            return BoundSlot(("resident", key), target, is_converted=True)
        with HostMemory(min(BOUNCE_BYTES, piece.nbytes)) as bounce:
            for low in range(0, piece.nbytes, bounce.nbytes):
                part = replace(piece, start=piece.start + low, nbytes=min(bounce.nbytes, piece.nbytes - low))
                read_piece(part, bounce.view[: part.nbytes], self._style)
                target[low : low + part.nbytes].copy_(bounce.tensor[: part.nbytes])
        return BoundSlot(("resident", key), target)

    def to_ram(self, piece: Piece) -> torch.Tensor:
        """The piece as stored, in the RAM tier: uint8 [nbytes].

        Raises:
            ShardError: it cannot be read.
            DeviceError: the host's memory is too short.
        """
        return self.tier.load(piece.key, piece.nbytes, lambda view: read_piece(piece, view, self._style))

    def to_ram_converted(self, key: int, piece: Piece, binding: LayerBinding, dtype: torch.dtype) -> BoundSlot:
        """The piece in the RAM tier, in the compute dtype, for a CPU to compute with.

        Raises:
            ShardError: it cannot be read.
            DeviceError: the host's memory is too short.
        """
        if not binding.needs_conversion:
            return BoundSlot(("resident", key), self.to_ram(piece))

        def fill(view: memoryview) -> None:
            with HostMemory(piece.nbytes) as stored:
                read_piece(piece, stored.view, self._style)
                binding.convert(stored.tensor, torch.frombuffer(view, dtype=torch.uint8))

        name = f"{piece.key}-{str(dtype).removeprefix('torch.')}"
        return BoundSlot(("resident", key), self.tier.load(name, binding.converted_bytes, fill), is_converted=True)

    def into_model(self, model: nn.Module, root: Shard, spec: TensorSpec, dtype: torch.dtype) -> None:
        """Give `model` the tensor `spec` of its root shard for good, on the device or, on a CPU, in the RAM tier.

        Raises:
            ShardError: it cannot be read.
        """
        piece = tensor_piece(root, spec)
        binding = LayerBinding(model, (spec.moved(-spec.offset),))
        binding.prepare(self.device)
        if self.device.type == "cpu":
            slot = self.to_ram_converted(spec.offset, piece, binding, dtype)
        else:
            target = torch.empty(resident_bytes(piece, binding), dtype=torch.uint8, device=self.device)
            slot = self.to_device(spec.offset, piece, binding, target)
        binding.bind(slot)


def resident_bytes(piece: Piece, binding: LayerBinding) -> int:
    """Bytes that the piece takes where it stays to be computed with."""
    return binding.converted_bytes if binding.needs_conversion else piece.nbytes
