"""What a shard is: the bytes of one layer (or of everything outside the layers) as one file, and where tensors lie.

A shard is an ordinary safetensors file whose header is padded so that its data starts on 4096 bytes, with every
tensor on 64. `shard_store` makes and checks them, `reader` moves them, `binding` turns them into parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

DATA_ALIGNMENT = 4096
TENSOR_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a shard: name relative to the layer (or to the model), torch dtype name, place in the data.

    A packed tensor has the type and shape that it expands to, the bytes of all its parts and the place of the first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the data, a multiple of 64
    nbytes: int
    packed: PackedParts | None = None

    @property
    def end(self) -> int:
        """Where it ends in the data; what a packed one consists of has padding between."""
        pieces = (*self.packed.parts, *self.packed.strips) if self.packed else ()
        return max((piece.end for piece in pieces), default=self.offset + self.nbytes)

    @property
    def span(self) -> int:
        """Bytes from where it begins to where it ends."""
        return self.end - self.offset

    def moved(self, by: int) -> TensorSpec:
        """The same tensor `by` bytes further on."""
        return replace(self, offset=self.offset + by, packed=self.packed and self.packed.moved(by))


@dataclass(frozen=True)
class PackedParts:
    """How a tensor is packed: name of the format, and its parts, each under the suffix it has in the format.

    What lies outside the layers has no parts of its own but `strips`: some consecutive rows each, packed on their own
    and lying one behind the other, so that any run of them can be read, moved and expanded alone.
    """

    format: str
    parts: tuple[TensorSpec, ...]
    strips: tuple[TensorSpec, ...] = ()

    def moved(self, by: int) -> PackedParts:
        """The same parts `by` bytes further on."""
        parts, strips = (tuple(spec.moved(by) for spec in specs) for specs in (self.parts, self.strips))
        return PackedParts(self.format, parts, strips)


@dataclass(frozen=True)
class Shard:
    """One layer, or all that is outside of them: `nbytes` bytes of a file from `data_start` on.

    Mostly the whole file; a layer that is read in place is part of one of the original's. `digest` is the SHA-256 of
    the whole file in hex, as recorded when it was built; empty where nobody recorded one.
    """

    path: Path
    data_start: int
    nbytes: int
    tensors: tuple[TensorSpec, ...]
    digest: str = ""


@dataclass(frozen=True)
class ShardedModel:
    """A model in the store, checked and ready to stream.

    Attributes:
        name: the model's name as asked for.
        directory: its directory in the store; config, generation config and tokenizer files lie in it.
        dtype: torch dtype name the weights are stored in (of most bytes).
        root: tensors outside the layers, under their full native names (embedding, final norm, head).
        layers: one shard per decoder layer, in order; names relative to the layer.
        size_bytes: bytes of all shards' data.
    """

    name: str
    directory: Path
    dtype: str
    root: Shard
    layers: tuple[Shard, ...]
    size_bytes: int

    @property
    def layer_files(self) -> list[Path]:
        """The files that hold layers, each once."""
        return files_of(self.layers)


def files_of(shards: Iterable[Shard]) -> list[Path]:
    """The files that hold `shards`, each once."""
    return list(dict.fromkeys(shard.path for shard in shards))
