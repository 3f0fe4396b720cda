"""Embedding without the table: the rows that a sweep needs are gathered from host memory or from the shard file.

A sweep has a few tokens and a table has hundreds of thousands of rows, so the table is neither copied to the device
nor, where host memory is short, kept in it.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamella_engine.errors import ShardError
from lamella_engine.pieces import Piece
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


class EmbeddingRows:
    """Lets `embedding` compute with rows of `table` ([vocabulary, width], on the host) in place of a weight.

    The module's own forward runs, on a small table of just the rows asked for, on `device` and in its own dtype.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        table: torch.Tensor,
        device: torch.device,
        timeline: Timeline,
        *,
        is_on_disk: bool,
    ) -> None:
        self._table = table
        self._device = device
        self._dtype = embedding.weight.dtype
        self._timeline = timeline
        self._is_on_disk = is_on_disk
        # Some families ask where the weight is before they look anything up; this one takes no memory.
        nowhere = torch.zeros((), dtype=self._dtype, device=device).expand(table.shape)
        embedding.__dict__["_parameters"]["weight"] = nowhere
        embedding.padding_idx = None  # only training uses it, and it is checked against the number of rows
        embedding.register_forward_pre_hook(self._gather)

    def _gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        wanted, places = torch.unique(ids.cpu(), return_inverse=True)
        rows = self._table.index_select(0, wanted)
        self._timeline.add_sweep_bytes(
            rows.nbytes if self._is_on_disk else 0, 0 if self._is_on_disk else rows.nbytes, 0
        )
        module.__dict__["_parameters"]["weight"] = rows.to(self._device, self._dtype)  # a plain tensor
        return (places.to(ids.device), *args[1:])
