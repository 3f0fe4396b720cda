"""The pieces a model is moved in: contiguous bytes of a shard file, in the order in which a sweep needs them.

A piece is a whole layer, or a block of rows of an output head that does not stay on the device. `weight_stream`
brings pieces to where they are computed; `disk_reader` and `file_reads` fetch their bytes.
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
    return Piece(spec.name, shard.path, shard.data_start + spec.offset, spec.nbytes, shard.digest)


def head_blocks(shard: Shard, spec: TensorSpec, num_blocks: int) -> tuple[Piece, ...]:
    """The head's weight `spec` ([rows, width]) as row blocks of nearly equal size."""
    row_bytes = spec.nbytes // spec.shape[0]
    start = shard.data_start + spec.offset
    return tuple(
        Piece(f"head {block}", shard.path, start + low * row_bytes, (high - low) * row_bytes, shard.digest)
        for block, (low, high) in enumerate(head_rows(spec.shape[0], num_blocks))
    )


def head_rows(num_rows: int, num_blocks: int) -> list[tuple[int, int]]:
    """First row and end of each of `num_blocks` blocks."""
    bounds = [num_rows * block // num_blocks for block in range(num_blocks + 1)]
    return list(pairwise(bounds))


def place_pieces(
    sharded: ShardedModel, plan: Plan, head: TensorSpec | None, experts: Sequence[ExpertBytes | None]
) -> tuple[PlacedPiece, ...]:
    """All pieces in sweep order: the layers, then the blocks of a streamed head (`head` is its weight in the root)."""
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
    return [PlacedPiece(piece, place.tier) for piece in head_blocks(root, head, place.num_blocks)]
