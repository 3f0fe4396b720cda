"""What stays in memory between sweeps of a model's parts outside its decoder layers.

Called once when a model is opened. Norms and other small tensors stay on the device, the head too where it fits; of
the embedding table only the rows a sweep asks for are fetched, unless a head on the device is that table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from lamella_engine.architecture import Architecture, table_names
from lamella_engine.binding import TORCH_DTYPES
from lamella_engine.embedding_rows import EmbeddingRows, PackedTable, PlainTable, Table, map_piece
from lamella_engine.formats import find_format
from lamella_engine.loader import Loader
from lamella_engine.pieces import tensor_piece
from lamella_engine.placement import Plan, Tier
from lamella_engine.shard import Shard, TensorSpec
from lamella_engine.timeline import Timeline


@dataclass(frozen=True)
class RootTables:
    """The two large tensors outside the layers; `head` is the embedding's own where they share one."""

    embedding: TensorSpec | None
    head: TensorSpec | None


def find_tables(built: Architecture, tensors: tuple[TensorSpec, ...]) -> RootTables:
    """Which of the root shard's `tensors` are the embedding table and the head's weight."""
    by_name = {spec.name: spec for spec in tensors}
    embedding, head = table_names(built)
    table, own = by_name.get(embedding or ""), by_name.get(head or "")
    # A table that both share may be stored under the head's name.
    return RootTables(table or own, None if head is None else own or table)


def materialise_root(built: Architecture, root: Shard, plan: Plan, device: torch.device, loader: Loader) -> None:
    """Give the modules outside the layers their weights, and every module its computed buffers, on `device`.

    Tables that are not there whole are left out: the embedding is for `look_up_rows`, the head for `streamed_head`.

    Buffers that no checkpoint stores (rotary frequencies, embedding scales) are computed by the model's own
    initialisation; the flag on the parameters keeps that from touching weights.

    Raises:
        ShardError: the root shard cannot be read.
    """
    model = built.model
    tables = find_tables(built, root.tensors)
    stays = {spec.name for spec in root.tensors} - {spec.name for spec in (tables.embedding, tables.head) if spec}
    if tables.head is not None and plan.head.num_blocks == 0:
        stays.add(tables.head.name)
    for spec in root.tensors:
        if spec.name in stays:
            loader.into_model(model, root, spec, model.dtype)
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and not weight.is_meta:
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    model.tie_weights()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    compute_buffers(model, device)


def look_up_rows(
    built: Architecture, root: Shard, plan: Plan, loader: Loader, timeline: Timeline, head: torch.Tensor | None
) -> None:
    """Have the embedding look up its rows where the plan has the table, unless it is the head that is there whole.

    Args:
        built: the model, after `materialise_root`.
        root: holds the table.
        plan: says where it is.
        loader: keeps it in RAM.
        timeline: told of the rows' bytes.
        head: the packed head where it stays on the device, uint8; the table may be that.

    Raises:
        ShardError: the root shard cannot be read.
    """
    tables = find_tables(built, root.tensors)
    spec = tables.embedding
    if spec is None or (spec == tables.head and not plan.head.num_blocks):
        return
    piece = tensor_piece(root, spec)
    if plan.embedding is Tier.VRAM:
        assert head is not None, "only a table that is the head is on the device"
        stored = head
    else:
        stored = map_piece(piece) if plan.embedding is Tier.DISK else loader.to_ram(piece)
    table: Table
    if spec.packed is not None:
        find_format(spec.packed.format).prepare(loader.device, built.model.dtype)
        table = PackedTable(spec.moved(-spec.offset), stored)
    else:
        table = PlainTable(stored.view(TORCH_DTYPES[spec.dtype]).view(spec.shape))
    EmbeddingRows(built.model.get_input_embeddings(), table, loader.device, timeline, tier=plan.embedding)


def compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Give every module of `model` the buffers that no checkpoint stores, by the model's own initialisation.

    Parameters are to be marked as initialised before, or it would touch them.
    """
    owners = {}
    for name, buffer in list(model.named_non_persistent_buffers()):  # type: ignore[operator] # transformers' own
        path, _, leaf = name.rpartition(".")
        owner = owners[path] = model.get_submodule(path)
        owner._buffers[leaf] = torch.empty_like(buffer, device=device)
    # What a module cannot compute alone, one around it does.
    around = {path.rpartition(".")[0] for path in owners}
    while around:
        owners |= {path: model.get_submodule(path) for path in around}
        around = {path.rpartition(".")[0] for path in around} - owners.keys()
    for path, owner in owners.items():
        _model_around(model, path)._init_weights(owner)


def _model_around(model: nn.Module, path: str) -> PreTrainedModel:
    """The innermost of transformers' models that the module at `path` is or lies in: its rules initialise it."""
    while not isinstance(inner := model.get_submodule(path), PreTrainedModel):
        path = path.rpartition(".")[0]
    return inner
