"""A model of the store as a place that weights come from: for building another form of it, such as a packed one.

Owns reading whole tensors from shards. Neighbours: `shard_store` opens it, `shard_builder` builds from it.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from lamella_engine import architecture
from lamella_engine.architecture import Architecture
from lamella_engine.binding import TORCH_DTYPES
from lamella_engine.checkpoint import read_bytes
from lamella_engine.manifest import Manifest
from lamella_engine.safetensors_header import TensorEntry
from lamella_engine.shard import Shard, ShardedModel, TensorSpec, files_of
from lamella_engine.weight_source import Conversion, SourceKind, TensorShape


class StoredCheckpoint:
    """A `WeightSource` over shards that hold every tensor in full precision, under native names.

    Attributes:
        path: directory of the build.
        kind, location, revision: where the shards themselves came from.
        packing: None.
    """

    packing: str | None = None

    def __init__(self, model: ShardedModel, manifest: Manifest) -> None:
        self.path = model.directory
        self.kind, self.location, self.revision = SourceKind(manifest.source_kind), manifest.source, manifest.revision
        self._model = model
        self._manifest = manifest

    @property
    def fingerprint(self) -> str:
        """That of what the shards were built from."""
        return self._manifest.fingerprint

    @property
    def dtype(self) -> str:
        """Torch dtype name of most stored bytes."""
        return self._model.dtype

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The shards."""
        return tuple(files_of((self._model.root, *self._model.layers)))

    @property
    def num_tensors(self) -> int:
        """How many tensors the shards hold."""
        return sum(len(shard.tensors) for shard in (self._model.root, *self._model.layers))

    @property
    def companion_bytes(self) -> int:
        """Bytes of config and tokenizer files."""
        return sum(record.nbytes for record in self._manifest.companions)

    def load_config(self) -> PretrainedConfig:
        """The model's config."""
        return architecture.load_config(self.path)

    def conversions(self, built: Architecture) -> list[Conversion]:
        """Every tensor as it is stored."""
        prefixes = ["", *(f"{built.layers_path}.{index}." for index in range(len(self._model.layers)))]
        return [
            _conversion(shard, spec, prefix + spec.name)
            for prefix, shard in zip(prefixes, (self._model.root, *self._model.layers), strict=True)
            for spec in shard.tensors
        ]

    def find(self, tensor: str) -> tuple[Path, TensorEntry] | None:
        """None: what is in the store is not left in place a second time."""
        return None

    def write_companions(self, directory: Path, config: PretrainedConfig) -> None:
        """Copy config and tokenizer files as they are."""
        for record in self._manifest.companions:
            shutil.copyfile(self.path / record.file, directory / record.file)


def _conversion(shard: Shard, spec: TensorSpec, name: str) -> Conversion:
    return Conversion((TensorShape(name, spec.dtype, spec.shape),), (name,), partial(_read, shard, spec, name))


def _read(shard: Shard, spec: TensorSpec, name: str) -> dict[str, torch.Tensor]:
    data = read_bytes(shard.path, shard.data_start + spec.offset, spec.nbytes)
    return {name: data.view(TORCH_DTYPES[spec.dtype]).view(spec.shape)}
