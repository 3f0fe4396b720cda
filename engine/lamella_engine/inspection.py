"""What a model is and what would fit where, from its config and headers alone: no weight is read.

Owns the arithmetic from config values to sizes. A model of the store is described by its manifest, a path by its
headers, a model on the hub by its config. Neighbours: `architecture` builds the module tree without weights,
`engine` sizes its cache with `kv_bytes_per_token`, `cli` prints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from lamella_engine import architecture, convert, hub
from lamella_engine.architecture import Architecture
from lamella_engine.errors import UnsupportedModel
from lamella_engine.names import is_model_name
from lamella_engine.shard_check import read_shard_layout
from lamella_engine.shard_store import ShardStore, open_source
from lamella_engine.shard_writer import size_of
from lamella_engine.slots import MAX_DEVICE_SLOTS
from lamella_engine.weight_source import WeightSource

GIB = 1024**3
CARDS_GIB = (4, 6, 8, 12, 24)
CARD_RESERVE_BYTES = GIB // 2  # CUDA context, kernels and the activations of a sweep
CARD_CONTEXT_TOKENS = 2048  # key-value cache a card must have room for, or the whole context if that is shorter


@dataclass(frozen=True)
class CardFit:
    """What a card of `card_bytes` would hold: whether the model runs, and how many layers need no streaming."""

    card_bytes: int
    runs: bool
    resident_layers: int


@dataclass(frozen=True)
class ModelFacts:
    """One model in figures; sizes in bytes as stored in the shards.

    Attributes:
        name: as asked for.
        found_in: ``store``, ``path`` or ``hub``.
        revision: the commit, where known.
        family: transformers' model type.
        dtype: torch dtype name of most weights.
        obstacle: why the model cannot run here, or None. Sizes are 0 then, unless the store has it.
        parameters: numbers in all weights, tied ones counted once.
        layer_bytes_min, layer_bytes_max, layers_bytes: smallest layer, largest, all together.
        root_bytes: everything outside the layers, always resident.
        attention_heads: query heads. None where the family has no attention.
        kv_heads, key_widths, value_widths: the distinct values over the layers, ascending.
        context_length: tokens; None where the config names no limit.
        sliding_window: tokens, or None if every layer sees everything.
        kv_bytes_per_token: upper bound for all layers together, in `dtype`.
        cards: what fits on cards of usual sizes; empty if there is an obstacle.
    """

    name: str
    found_in: str
    revision: str | None
    family: str
    dtype: str
    obstacle: str | None
    parameters: int
    num_layers: int
    layer_bytes_min: int
    layer_bytes_max: int
    layers_bytes: int
    root_bytes: int
    hidden_size: int
    attention_heads: int | None
    kv_heads: tuple[int, ...]
    key_widths: tuple[int, ...]
    value_widths: tuple[int, ...]
    context_length: int | None
    sliding_window: int | None
    vocabulary: int
    tied_embeddings: bool
    kv_bytes_per_token: int
    cards: tuple[CardFit, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights."""
        return self.layers_bytes + self.root_bytes


@dataclass(frozen=True)
class _KVShape:
    """What one layer keeps of one token: `heads` keys of `key_width` numbers and as many values of `value_width`."""

    heads: int
    key_width: int
    value_width: int

    @property
    def width(self) -> int:
        return self.heads * (self.key_width + self.value_width)


@dataclass(frozen=True)
class _Sizes:
    root_bytes: int
    layers: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class _Source:
    """Where the facts come from: a config, and sizes that are known without the module tree (a built model)."""

    name: str
    found_in: str
    revision: str | None
    config: PretrainedConfig
    dtype: str
    built_sizes: _Sizes | None = None
    checkpoint: WeightSource | None = None


def inspect(model: str | Path, store: ShardStore, *, hub_token: str | None = None) -> ModelFacts:
    """Describe a model of the store, a checkpoint directory, a ``.gguf`` file or a model on the hub.

    Only the hub's ``config.json`` is fetched; sizes then assume the dtype that it names.

    Raises:
        ModelNotFound: it is nowhere.
        ModelError: its config or headers cannot be read, or transformers has no class for its family.
    """
    source = _find(model, store, hub_token)
    text = source.config.get_text_config(decoder=True)
    obstacle: str | None = None
    sizes = source.built_sizes or _Sizes(0, (), 0)
    try:
        _refuse_quantised(source)
        built = architecture.build(source.config, _dtype(source.dtype))
        if source.built_sizes is None:
            sizes = _sizes(built, source.checkpoint)
    except UnsupportedModel as error:
        obstacle = str(error)
    shapes = _kv_shapes(text)
    per_token = sum(shape.width for shape in shapes) * _dtype(source.dtype).itemsize
    context = _whole(text, "max_position_embeddings")
    is_tied = bool(getattr(source.config, "tie_word_embeddings", False))
    return ModelFacts(
        name=source.name,
        found_in=source.found_in,
        revision=source.revision,
        family=str(source.config.model_type),
        dtype=source.dtype,
        obstacle=obstacle,
        parameters=sizes.parameters,
        num_layers=int(text.num_hidden_layers),
        layer_bytes_min=min(sizes.layers, default=0),
        layer_bytes_max=max(sizes.layers, default=0),
        layers_bytes=sum(sizes.layers),
        root_bytes=sizes.root_bytes,
        hidden_size=int(text.hidden_size),
        attention_heads=_whole(text, "num_attention_heads"),
        kv_heads=tuple(sorted({shape.heads for shape in shapes})),
        key_widths=tuple(sorted({shape.key_width for shape in shapes})),
        value_widths=tuple(sorted({shape.value_width for shape in shapes})),
        context_length=context,
        sliding_window=_narrowest_window(text),
        vocabulary=int(text.vocab_size),
        tied_embeddings=is_tied,
        kv_bytes_per_token=per_token,
        cards=() if obstacle else _cards(sizes, text, _dtype(source.dtype), is_tied),
    )


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes in all layers together, in the packed sweep; an upper bound.

    `config` may nest a text model's config. Sliding-window layers count in full, layers that share keys too. Latent
    attention counts as transformers hands it to attention: expanded to one key and one value per query head.
    """
    shapes = _kv_shapes(config.get_text_config(decoder=True))
    return sum(shape.width for shape in shapes) * dtype.itemsize


def _kv_shapes(config: PretrainedConfig) -> list[_KVShape]:
    """Each layer's key-value shape; empty for a family without attention."""
    if _whole(config, "num_attention_heads") is None:
        return []
    return [_kv_shape(layer) for layer in config.per_layer_config]


def _kv_shape(layer: PretrainedConfig) -> _KVShape:
    query_heads = int(layer.num_attention_heads)
    if _whole(layer, "kv_lora_rank"):
        key_width = int(layer.qk_nope_head_dim) + int(layer.qk_rope_head_dim)
        return _KVShape(query_heads, key_width, int(layer.v_head_dim))
    heads = _whole(layer, "num_key_value_heads") or _whole(layer, "num_kv_heads") or query_heads
    key_width = _whole(layer, "head_dim") or int(layer.hidden_size) // query_heads
    return _KVShape(heads, key_width, _whole(layer, "v_head_dim") or key_width)


def _whole(config: PretrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return int(value) if isinstance(value, int) else None


def _narrowest_window(config: PretrainedConfig) -> int | None:
    windows = architecture.sliding_windows(config, int(config.num_hidden_layers))
    return min((window for window in windows if window is not None), default=None)


def _find(model: str | Path, store: ShardStore, hub_token: str | None) -> _Source:
    if isinstance(model, str) and _is_stored(model, store):
        return _stored(model, store)
    path = Path(model).expanduser()
    if isinstance(model, Path) or path.exists() or not _is_name(model):
        checkpoint = open_source(path)
        return _Source(str(model), "path", None, checkpoint.load_config(), checkpoint.dtype, checkpoint=checkpoint)
    snapshot = hub.fetch_config(model, hub_token)
    config = architecture.load_config(snapshot.directory)
    named = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
    return _Source(model, "hub", snapshot.revision, config, str(named).removeprefix("torch."))


def _refuse_quantised(source: _Source) -> None:
    """A checkpoint on disk was refused when it was opened; of a model on the hub only the config is known."""
    if source.found_in == "hub" and getattr(source.config, "quantization_config", None):
        raise UnsupportedModel(f"{source.name} is quantised, which cannot be expanded; use its bf16 or fp16 checkpoint")


def _is_name(model: str) -> bool:
    return is_model_name(model) and not model.endswith(".gguf")


def _is_stored(model: str, store: ShardStore) -> bool:
    return _is_name(model) and store.has(model)


def _stored(name: str, store: ShardStore) -> _Source:
    manifest = store.manifest(name)
    directory = store.build_directory(manifest)
    shards = [read_shard_layout(directory / record.file, name) for record in manifest.shards]
    root, *layers = (sum(tensor.nbytes for tensor in shard.tensors) for shard in shards)
    parameters = sum(math.prod(tensor.shape) for shard in shards for tensor in shard.tensors)
    config = architecture.load_config(directory)
    sizes = _Sizes(root, tuple(layers), parameters)
    return _Source(name, "store", manifest.revision, config, manifest.dtype, built_sizes=sizes)


def _sizes(built: Architecture, checkpoint: WeightSource | None) -> _Sizes:
    """Sizes of what the shards would hold: by the checkpoint's headers, else by the module tree."""
    conversions = checkpoint.conversions(built) if checkpoint is not None else convert.native_conversions(built)
    plan = convert.plan(built, conversions, None)
    shards = [shard.tensors for shard in (plan.root, *plan.layers)]
    root, *layers = (sum(map(size_of, tensors)) for tensors in shards)
    parameters = sum(math.prod(tensor.shape) for tensors in shards for tensor in tensors)
    return _Sizes(root, tuple(layers), parameters)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype), "dtype names come from torch"
    return found


def _cards(sizes: _Sizes, text: PretrainedConfig, dtype: torch.dtype, is_tied: bool) -> tuple[CardFit, ...]:
    """What fits beside a useful key-value cache and what lies outside the layers, less a table kept in host memory."""
    tokens = min(_whole(text, "max_position_embeddings") or CARD_CONTEXT_TOKENS, CARD_CONTEXT_TOKENS)
    table_bytes = 0 if is_tied else int(text.vocab_size) * int(text.hidden_size) * dtype.itemsize
    fixed_bytes = sizes.root_bytes - table_bytes + tokens * kv_bytes_per_token(text, dtype)
    return tuple(_card(gib * GIB, sizes, fixed_bytes) for gib in CARDS_GIB)


def _card(card_bytes: int, sizes: _Sizes, fixed_bytes: int) -> CardFit:
    """A card that holds every layer needs no slots to stream through; else those come first, one at the least."""
    room = card_bytes - CARD_RESERVE_BYTES - fixed_bytes
    if sum(sizes.layers) <= room:
        return CardFit(card_bytes, True, len(sizes.layers))
    runs = max(sizes.layers) <= room
    room -= MAX_DEVICE_SLOTS * max(sizes.layers)
    resident = 0
    for nbytes in sorted(sizes.layers):
        room -= nbytes
        resident += room >= 0
    return CardFit(card_bytes, runs, resident)
