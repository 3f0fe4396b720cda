"""Where a model is, whether built, as a checkpoint or on the hub, and what its shards hold: no weight is read.

A model of the store is told by its shards' headers, a checkpoint by its own headers, a model on the hub by its config
(the only file that is fetched). `inspection` and `model_sizes` do the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig

from lamella_engine import architecture, convert, dequantise, hub
from lamella_engine.architecture import Architecture
from lamella_engine.errors import ModelNotFound, UnsupportedModel
from lamella_engine.names import check_model_name, is_model_name
from lamella_engine.open_source import open_source
from lamella_engine.shard import Shard, TensorSpec
from lamella_engine.shard_check import read_shards
from lamella_engine.shard_store import ShardStore
from lamella_engine.shard_writer import lay_out, size_of
from lamella_engine.weight_source import TensorShape, WeightSource


@dataclass(frozen=True)
class ShardContents:
    """One shard, built or to be built: bytes of its data, padding included, and its tensors as they expand to.

    `packed` has the bytes of those that are stored packed, by name; `specs` says where they lie in a built one.
    """

    nbytes: int
    tensors: tuple[TensorShape, ...]
    packed: Mapping[str, int] = field(default_factory=dict)
    specs: tuple[TensorSpec, ...] = ()

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors alone, expanded."""
        return sum(map(size_of, self.tensors))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors alone, as they are stored."""
        return sum(map(self.stored_size, self.tensors))

    def stored_size(self, tensor: TensorShape) -> int:
        """Bytes of one of `tensors`, as it is stored."""
        return self.packed.get(tensor.name, size_of(tensor))

    @classmethod
    def of_shard(cls, shard: Shard) -> ShardContents:
        """What a built shard holds."""
        tensors = tuple(TensorShape(spec.name, spec.dtype, spec.shape) for spec in shard.tensors)
        packed = {spec.name: spec.nbytes for spec in shard.tensors if spec.packed is not None}
        return cls(shard.nbytes, tensors, packed, shard.tensors)

    @classmethod
    def planned(cls, tensors: Iterable[TensorShape]) -> ShardContents:
        """What a shard made of `tensors` will hold."""
        layout = lay_out(tensors)
        return cls(layout.file_bytes - len(layout.header), tuple(tensor for _, tensor in layout.places.values()))


@dataclass(frozen=True)
class ModelContents:
    """All shards of a model: what lies outside the layers, under full names, and each layer, under names in it."""

    root: ShardContents
    layers: tuple[ShardContents, ...]

    @property
    def is_packed(self) -> bool:
        """Whether tensors of layers have to be expanded."""
        return any(layer.packed for layer in self.layers)


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        name: as asked for.
        found_in: ``store``, ``path`` or ``hub``.
        revision: the commit, where known.
        config: transformers' config.
        dtype: torch dtype name of most weights, as they are or would be stored.
        packing: the packed format that its weights arrive in, in words, or that the store has them in; None if plain.
        shards: the root's and the layers', if the store has them; else empty.
        checkpoint: the opened checkpoint, if it is one.
        obstacle: why its weights cannot be read, where that was not refused at once.
    """

    name: str
    found_in: str
    revision: str | None
    config: PretrainedConfig
    dtype: str
    packing: str | None = None
    shards: tuple[Shard, ...] = ()
    checkpoint: WeightSource | None = None
    obstacle: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return torch_dtype(self.dtype)

    def build(self) -> Architecture:
        """The module tree without weights, in the dtype that is stored.

        Raises:
            UnsupportedModel: it cannot run here.
        """
        if self.obstacle is not None:
            raise UnsupportedModel(self.obstacle)
        return architecture.build(self.config, self.torch_dtype)

    def contents(self, built: Architecture | None = None) -> ModelContents:
        """What its shards hold or would hold: by headers, else by the module tree.

        Raises:
            CheckpointError: the checkpoint is incomplete.
            UnsupportedModel: it cannot run here; not said of a model of the store.
        """
        if self.shards:
            root, *layers = map(ShardContents.of_shard, self.shards)
            return ModelContents(root, tuple(layers))
        tree = built or self.build()
        checkpoint = self.checkpoint
        conversions = checkpoint.conversions(tree) if checkpoint is not None else convert.native_conversions(tree)
        plan = convert.plan(tree, conversions, None)
        root, *layers = (ShardContents.planned(shard.tensors) for shard in (plan.root, *plan.layers))
        return ModelContents(root, tuple(layers))


def find_model(
    model: str | Path, store: ShardStore, *, hub_token: str | None = None, offline: bool = False
) -> ModelSource:
    """Find `model`: a name in the store, else a checkpoint directory or ``.gguf`` file, else a name on the hub.

    Raises:
        ModelNotFound: it is nowhere, or only the hub might have it and `offline` forbids asking.
        ModelError: its config or headers cannot be read, or transformers has no class for its family.
    """
    if isinstance(model, str) and _is_name(model) and store.has(model):
        return _stored(model, store)
    path = Path(model).expanduser()
    if isinstance(model, Path) or path.exists() or not _is_name(model):
        checkpoint = open_source(path)
        config = checkpoint.load_config()
        packing = checkpoint.packing
        return ModelSource(str(model), "path", None, config, checkpoint.dtype, packing, checkpoint=checkpoint)
    if offline:
        raise ModelNotFound(
            f"{check_model_name(model)} is neither in the store {store.root} nor a path here, and the hub is not asked "
            "(offline). Leave --offline out, or give the path of a checkpoint."
        )
    snapshot = hub.fetch_config(model, hub_token)
    return _on_hub(model, snapshot)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype), "dtype names come from torch"
    return found


def _is_name(model: str) -> bool:
    return is_model_name(model) and not model.endswith(".gguf")


def _on_hub(name: str, snapshot: hub.HubSnapshot) -> ModelSource:
    """A model of which only the config is known."""
    config = architecture.load_config(snapshot.directory)
    settings = dequantise.find_settings(config, snapshot.directory)
    if settings is None:
        named = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
        return ModelSource(name, "hub", snapshot.revision, config, str(named).removeprefix("torch."))
    packing, obstacle = None, None
    try:
        packing = dequantise.check_settings(settings)
    except UnsupportedModel as error:
        obstacle = str(error)
    dtype = str(dequantise.expanded_dtype(config)).removeprefix("torch.")
    dequantise.forget_settings(config)
    return ModelSource(name, "hub", snapshot.revision, config, dtype, packing, obstacle=obstacle)


def _stored(name: str, store: ShardStore) -> ModelSource:
    manifest = store.manifest(name)
    directory = store.build_directory(manifest)
    shards = read_shards(manifest, directory)
    config = architecture.load_config(directory)
    packing = manifest.quant or None
    return ModelSource(name, "store", manifest.revision, config, manifest.dtype, packing, shards=shards)
