"""The pieces a model is moved in: contiguous bytes of a shard file, in the order in which a sweep needs them.

A piece is a whole layer, or a block of rows of an output head that does not stay on the device ready to compute with.
`weight_stream` brings pieces to where they are computed; `disk_reader` and `file_reads` fetch their bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lamella_engine.errors import ShardError
from lamella_engine.experts import ExpertBytes, Range
from lamella_engine.placement import HeadPlacement, Plan, Tier
from lamella_engine.shard import Shard, ShardedModel, TensorSpec


@dataclass(frozen=True)
class Piece:
    """`nbytes` bytes of the file `path` from `start` on; `digest` names the file's contents.

    `experts` says which of them need not come with the rest.
    """

    name: str
    path: Path
    start: int
    nbytes: int
    digest: str
    experts: ExpertBytes | None = None

    def ranges(self, *, is_sparse: bool) -> list[Range]:
        """Offset and length of what is brought ahead: everything, or all but the experts."""
        if is_sparse and self.experts is not None:
            return self.experts.others(self.nbytes)
        return [(0, self.nbytes)]

    @property
    def key(self) -> str:
        """A name that only these bytes have, whatever file they lie in."""
        return f"{self.digest}-{self.start}-{self.nbytes}"


@dataclass(frozen=True)
class PlacedPiece:
    """A piece and where it waits between sweeps."""

    piece: Piece
    tier: Tier


def layer_piece(shard: Shard, index: int, experts: ExpertBytes | None = None) -> Piece:
    """The piece that is one decoder layer."""
    return Piece(f"layer {index}", shard.path, shard.data_start, shard.nbytes, shard.digest, experts)


def tensor_piece(shard: Shard, spec: TensorSpec) -> Piece:
    """The piece that is one tensor of a shard."""
    return Piece(spec.name, shard.path, shard.data_start + spec.offset, spec.span, shard.digest)


@dataclass(frozen=True)
class HeadBlock:
    """Rows `low` to `high - 1` of a head: `nbytes` bytes of a shard's data from `offset` on.

    `tensors` are these rows as they lie in the block, all in one, or strip by strip where they are packed.
    """

    low: int
    high: int
    offset: int
    nbytes: int
    tensors: tuple[TensorSpec, ...]


def cut_head(spec: TensorSpec, num_blocks: int) -> list[HeadBlock]:
    """The head's weight `spec` ([rows, width]) as blocks of nearly equal size, of whole strips where it is packed."""
    if spec.packed is not None:
        return _runs_of_strips(spec.packed.strips, num_blocks)
    row_bytes = spec.nbytes // spec.shape[0]
    blocks = []
    for low, high in head_rows(spec.shape[0], num_blocks):
        nbytes = (high - low) * row_bytes
        rows = TensorSpec(spec.name, spec.dtype, (high - low, *spec.shape[1:]), 0, nbytes)
        blocks.append(HeadBlock(low, high, spec.offset + low * row_bytes, nbytes, (rows,)))
    return blocks


def _runs_of_strips(strips: Sequence[TensorSpec], num_blocks: int) -> list[HeadBlock]:
    blocks: list[HeadBlock] = []
    for first, end in head_rows(len(strips), min(num_blocks, len(strips))):
        run = strips[first:end]
        low, offset = blocks[-1].high if blocks else 0, run[0].offset
        tensors = tuple(strip.moved(-offset) for strip in run)
        rows = sum(strip.shape[0] for strip in run)
        blocks.append(HeadBlock(low, low + rows, offset, run[-1].end - offset, tensors))
    return blocks


def head_rows(num_rows: int, num_blocks: int) -> list[tuple[int, int]]:
    """First row (or strip) and end of each of `num_blocks` blocks."""
    bounds = [num_rows * block // num_blocks for block in range(num_blocks + 1)]
    return list(pairwise(bounds))


def place_pieces(
    sharded: ShardedModel, plan: Plan, head: TensorSpec | None, experts: Sequence[ExpertBytes | None]
) -> tuple[PlacedPiece, ...]:
    """All pieces in sweep order: the layers, then the blocks of a head in blocks (`head` is its weight in the root)."""
    placed = [
        PlacedPiece(layer_piece(shard, place.layer, own), place.tier)
        for shard, place, own in zip(sharded.layers, plan.layers, experts, strict=True)
    ]
    return (*placed, *_head_pieces(sharded.root, plan.head, head))


def _head_pieces(root: Shard, place: HeadPlacement, head: TensorSpec | None) -> list[PlacedPiece]:
    if not place.num_blocks:
        return []
    if head is None:
        raise ShardError(f"{root.path} holds no weight of the head; remove the model from the store and build it again")
    return [
        PlacedPiece(
            Piece(f"head {number}", root.path, root.data_start + block.offset, block.nbytes, root.digest), place.tier
        )
        for number, block in enumerate(cut_head(head, place.num_blocks))
    ]
