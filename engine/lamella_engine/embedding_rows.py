"""Embedding without the table: the rows that a sweep needs are gathered from where the table is.

A sweep has a few tokens and a table has hundreds of thousands of rows, so the table is neither copied to the device
nor, where host memory is short, kept in it. Rows of a packed table are gathered packed and expanded on the device.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lamella_engine.binding import tensor_view
from lamella_engine.errors import ShardError
from lamella_engine.formats import find_format, packed_bytes
from lamella_engine.pieces import Piece
from lamella_engine.placement import Tier
from lamella_engine.shard import TensorSpec
from lamella_engine.timeline import Timeline


def map_piece(piece: Piece) -> torch.Tensor:
    """The bytes of `piece` as uint8 [nbytes], read from the file as they are touched, page by page.

    Raises:
        ShardError: the file cannot be mapped.
    """
    first = piece.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    skip = piece.start - first
    try:
        with Path(piece.path).open("rb") as file:
            mapping = mmap.mmap(file.fileno(), skip + piece.nbytes, access=mmap.ACCESS_COPY, offset=first)
    except (OSError, ValueError) as error:
        raise ShardError(f"cannot map {piece.path}: {error}. Build the model again.") from error
    if hasattr(mmap, "MADV_RANDOM"):
        mapping.madvise(mmap.MADV_RANDOM)
    return torch.frombuffer(mapping, dtype=torch.uint8)[skip:]


class Table(Protocol):
    """A table [rows, width] whose rows can be looked up."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and width."""

    def rows(self, wanted: torch.Tensor, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """Some rows, as `dtype` on `device`, and the bytes that they take as they are stored.

        Args:
            wanted: int64 on the host, rising, at least one.
            device: where they go.
            dtype: what they become.
        """


class PlainTable:
    """A table in full precision: `stored` [rows, width], on the host."""

    def __init__(self, stored: torch.Tensor) -> None:
        self._stored = stored

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Table`."""
        return tuple(self._stored.shape)

    def rows(self, wanted: torch.Tensor, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """See `Table`."""
        rows = self._stored.index_select(0, wanted)
        return rows.to(device, dtype), rows.nbytes


class PackedTable:
    """A table that is packed in strips.

    Args:
        spec: the table; its strips' offsets count from where `data` begins.
        data: its bytes, on the host or on the device.
    """

    def __init__(self, spec: TensorSpec, data: torch.Tensor) -> None:
        assert spec.packed is not None, "only packed tables have strips"
        self.shape = spec.shape
        self._format = find_format(spec.packed.format)
        self._home = data.device
        self._strips = [
            {part.name: tensor_view(data, part) for part in strip.packed.parts}
            for strip in spec.packed.strips
            if strip.packed is not None
        ]
        self._lows = torch.tensor([0, *(strip.shape[0] for strip in spec.packed.strips[:-1])]).cumsum(0)

    def rows(self, wanted: torch.Tensor, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """See `Table`."""
        strips = torch.searchsorted(self._lows, wanted, right=True) - 1
        found, of_each = torch.unique_consecutive(strips, return_counts=True)
        taken = [
            self._format.take_rows(self._strips[strip], (wanted[strips == strip] - self._lows[strip]).to(self._home))
            for strip in found.tolist()
        ]
        counts = of_each.tolist()
        nbytes = sum(map(packed_bytes, taken))
        if self._format.has_fixed_size:  # rows of all strips are alike, and one step expands them
            taken = [{name: torch.cat([parts[name] for parts in taken]) for name in taken[0]}]
            counts = [len(wanted)]
        made = torch.empty((len(wanted), *self.shape[1:]), dtype=dtype, device=device)
        for parts, into in zip(taken, torch.split(made, counts), strict=True):
            self._format.decode({name: part.to(device) for name, part in parts.items()}, into)
        return made, nbytes


class EmbeddingRows:
    """Lets `embedding` compute with rows of `table` in place of a weight.

    The module's own forward runs, on a small table of just the rows asked for, on `device` and in its own dtype.
    `tier` is where the table is.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        table: Table,
        device: torch.device,
        timeline: Timeline,
        *,
        tier: Tier,
    ) -> None:
        self._table = table
        self._device = device
        self._dtype = embedding.weight.dtype
        self._timeline = timeline
        self._tier = tier
        # Some families ask where the weight is before they look anything up; this one takes no memory.
        nowhere = torch.zeros((), dtype=self._dtype, device=device).expand(table.shape)
        embedding.__dict__["_parameters"]["weight"] = nowhere
        embedding.padding_idx = None  # only training uses it, and it is checked against the number of rows
        embedding.register_forward_pre_hook(self._gather)

    def _gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        wanted, places = torch.unique(ids.cpu(), return_inverse=True)
        rows, nbytes = self._table.rows(wanted, self._device, self._dtype)
        self._timeline.add_sweep_bytes(
            *(nbytes if tier is self._tier else 0 for tier in (Tier.DISK, Tier.RAM, Tier.VRAM))
        )
        module.__dict__["_parameters"]["weight"] = rows  # a plain tensor
        return (places.to(ids.device), *args[1:])
