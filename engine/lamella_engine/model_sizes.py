"""A model in figures for the planner: from built shards, or from what shards would hold.

Owns the way from tensors and config values to `ModelSizes`. Neighbours: `model_source` before it, `planner` after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from lamella_engine import architecture
from lamella_engine.alibi import slopes_of
from lamella_engine.architecture import Architecture
from lamella_engine.experts import expert_tensors
from lamella_engine.kv_shape import attention_width, context_tokens, kv_bytes_per_token, whole
from lamella_engine.model_source import ModelContents, ModelSource, ShardContents, torch_dtype
from lamella_engine.model_traits import EXPERT_COUNTS, ROUTED_COUNTS, first_whole
from lamella_engine.placement import ExpertSizes, ModelSizes, PackedTables
from lamella_engine.shard import TENSOR_ALIGNMENT, ShardedModel
from lamella_engine.shard_writer import size_of
from lamella_engine.state_pool import unit_bytes
from lamella_engine.weight_source import TensorShape

_INNER_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


def sizes_of_sharded(sharded: ShardedModel, built: Architecture) -> ModelSizes:
    """The sizes of a model of the store that computes in the dtype it was `built` in."""
    layers = tuple(map(ShardContents.of_shard, sharded.layers))
    contents = ModelContents(ShardContents.of_shard(sharded.root), layers)
    return _sizes(sharded.name, contents, built, torch_dtype(sharded.dtype), built.model.dtype)


def sizes_of_source(source: ModelSource, dtype: torch.dtype | None = None) -> ModelSizes:
    """The sizes of a model that was found, built or not; `dtype` is the type it computes in, None the stored one.

    Raises:
        CheckpointError: the checkpoint is incomplete.
        UnsupportedModel: it cannot run here.
    """
    tree = source.build()
    return sizes_of_contents(source, source.contents(tree), tree, dtype)


def sizes_of_contents(
    source: ModelSource, contents: ModelContents, tree: Architecture, dtype: torch.dtype | None = None
) -> ModelSizes:
    """As `sizes_of_source`, for a caller that has the contents and the tree (in the stored dtype) at hand."""
    if dtype is not None and dtype != source.torch_dtype:
        tree = architecture.build(source.config, dtype)
    return _sizes(source.name, contents, tree, source.torch_dtype, dtype or source.torch_dtype)


def _sizes(
    name: str, contents: ModelContents, tree: Architecture, stored: torch.dtype, dtype: torch.dtype
) -> ModelSizes:
    text = tree.config
    embedding, head = _tables(tree, contents.root)
    spans = {spec.name: spec.span for spec in contents.root.specs}
    table_bytes, head_bytes = (
        0 if tensor is None else spans.get(tensor.name, size_of(tensor)) for tensor in (embedding, head)
    )
    is_tied = head is None and tree.model.get_output_embeddings() is not None
    multiplied = embedding if is_tied else head
    return ModelSizes(
        name=name,
        layers=tuple(layer.nbytes for layer in contents.layers),
        embedding=table_bytes,
        head=head_bytes,
        is_tied=is_tied,
        other=contents.root.nbytes - table_bytes - head_bytes,
        kv_bytes_per_token=_kept_bytes(tree, dtype),
        expansion=1.0 if dtype == stored and not contents.is_packed else _expansion(contents.layers, tree),
        active_parameters=_active_parameters(contents.layers, text) + _numbers(multiplied),
        hidden_size=int(text.hidden_size),
        intermediate_size=_intermediate_size(text),
        attention_width=attention_width(text),
        vocabulary=multiplied.shape[0] if multiplied is not None else int(text.vocab_size),
        itemsize=dtype.itemsize,
        context_length=context_tokens(text),
        activation_bytes=0 if tree.state_size is None else tree.state_size.activation_bytes,
        pair_bytes=0 if tree.state_size is None else tree.state_size.pair_bytes,
        score_heads=0 if tree.state_size is None else tree.state_size.score_heads,
        bias_heads=len(slopes_of(text) or ()),
        reads_whole=not tree.reads_in_parts,
        experts=_experts(contents.layers, tree),
        root_expansion=dtype.itemsize / stored.itemsize if contents.is_packed else None,
        computed=_computed_layers(contents.layers, tree) if contents.is_packed else (),
        tables=_packed_tables(contents.root, tree, (embedding, head), multiplied),
    )


def _packed_tables(
    root: ShardContents, tree: Architecture, tables: Sequence[TensorShape | None], head: TensorShape | None
) -> PackedTables | None:
    """What the planner has to know of what lies outside the layers; None where nothing of it is packed."""
    if not root.packed:
        return None
    native = tree.model.state_dict()
    computed = {tensor.name: _computed_bytes(tensor, native.get(tensor.name)) for tensor in root.tensors}
    other = sum(nbytes for name, nbytes in computed.items() if name not in [table.name for table in tables if table])
    if head is None:
        return PackedTables(0, other)
    spec = next(spec for spec in root.specs if spec.name == head.name)
    strips = () if spec.packed is None else spec.packed.strips
    if not strips:
        return PackedTables(computed[head.name], other)
    ends = [*(strip.offset for strip in strips[1:]), spec.end]
    largest = max(end - strip.offset for strip, end in zip(strips, ends, strict=True))
    numbers = max(math.prod(strip.shape) for strip in strips)
    width = computed[head.name] // _numbers(head)
    return PackedTables(computed[head.name], other, len(strips), largest, numbers * width)


def _experts(layers: tuple[ShardContents, ...], tree: Architecture) -> ExpertSizes | None:
    routed = first_whole(tree.config, ROUTED_COUNTS)
    found = [expert_tensors(module, layer.tensors, routed) for module, layer in zip(tree.layers, layers, strict=True)]
    counts = {own[1] for own in found if own is not None}
    if len(counts) != 1 or routed is None:
        return None
    nbytes = tuple(
        0 if own is None else sum(map(layer.stored_size, own[2])) for layer, own in zip(layers, found, strict=True)
    )
    return ExpertSizes(counts.pop(), routed, nbytes)


def _kept_bytes(tree: Architecture, dtype: torch.dtype) -> int:
    """What the plan counts for a token that is kept: keys and values, or its part of a state."""
    if tree.state_size is None:
        return kv_bytes_per_token(tree.config, dtype)
    return unit_bytes(tree.state_size, context_tokens(tree.config))


def _tables(tree: Architecture, root: ShardContents) -> tuple[TensorShape | None, TensorShape | None]:
    """The embedding table and the head's own weight among the tensors of the root; None for what is not stored."""
    by_name = {tensor.name: tensor for tensor in root.tensors}
    embedding, head = (by_name.get(name or "") for name in architecture.table_names(tree))
    # Some families store a tied table under the head's name.
    return (head, None) if embedding is None else (embedding, head)


def _expansion(layers: tuple[ShardContents, ...], tree: Architecture) -> float:
    """Bytes in the types the modules compute in per stored byte; of the layer where it is most."""
    computed = _layer_bytes(layers, tree, alignment=1)
    return max(nbytes / max(1, layer.stored_bytes) for nbytes, layer in zip(computed, layers, strict=True))


def _computed_layers(layers: tuple[ShardContents, ...], tree: Architecture) -> tuple[int, ...]:
    """Bytes that each layer takes expanded, laid out as `binding` does it."""
    return tuple(_layer_bytes(layers, tree, alignment=TENSOR_ALIGNMENT))


def _layer_bytes(layers: tuple[ShardContents, ...], tree: Architecture, alignment: int) -> list[int]:
    native = tree.model.state_dict()
    return [
        sum(
            -(-_computed_bytes(tensor, native.get(f"{tree.layers_path}.{index}.{tensor.name}")) // alignment)
            * alignment
            for tensor in layer.tensors
        )
        for index, layer in enumerate(layers)
    ]


def _computed_bytes(tensor: TensorShape, expected: torch.Tensor | None) -> int:
    if expected is None or not expected.is_floating_point():
        return size_of(tensor)
    return _numbers(tensor) * expected.dtype.itemsize


def _active_parameters(layers: tuple[ShardContents, ...], text: PretrainedConfig) -> int:
    """Weights of the layers that one token meets: of the experts only those it is routed to."""
    total = sum(_numbers(tensor) for layer in layers for tensor in layer.tensors)
    in_experts = sum(
        _numbers(tensor) for layer in layers for tensor in layer.tensors if "experts" in tensor.name.split(".")
    )
    routed, experts = first_whole(text, ROUTED_COUNTS), first_whole(text, EXPERT_COUNTS)
    share = min(1.0, routed / experts) if routed and experts else 1.0
    return total - in_experts + math.ceil(in_experts * share)


def _intermediate_size(text: PretrainedConfig) -> int:
    """Width inside the feed-forward part; for routed experts what one token needs in all those it visits.

    Each visited expert also takes a copy of the input and gives one of the output: two hidden rows, where a width
    counts four times in the workspace.
    """
    dense = max(_widest(text, name) for name in _INNER_WIDTHS) or 4 * int(text.hidden_size)
    routed = first_whole(text, ROUTED_COUNTS) if first_whole(text, EXPERT_COUNTS) else None
    if not routed:
        return dense
    inside = _widest(text, "moe_intermediate_size") or dense
    shared = _widest(text, "shared_expert_intermediate_size") or inside * (whole(text, "n_shared_experts") or 0)
    return max(dense, routed * (inside + -(-int(text.hidden_size) // 2)) + shared)


def _widest(text: PretrainedConfig, name: str) -> int:
    """A width of the config, the largest where it names one a layer; 0 if it names none."""
    value = getattr(text, name, None)
    widths = value if isinstance(value, list | tuple) else [value]
    return max((int(width) for width in widths if isinstance(width, int)), default=0)


def _numbers(tensor: TensorShape | None) -> int:
    return 0 if tensor is None else math.prod(tensor.shape)
