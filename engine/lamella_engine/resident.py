"""What stays in memory between sweeps: everything of the model outside its decoder layers.

Called once when a model is opened; `sweep` then streams the layers past it.
"""

from __future__ import annotations

import torch
from torch import nn

from lamella_engine.architecture import Architecture
from lamella_engine.binding import LayerBinding
from lamella_engine.reader import read_shard
from lamella_engine.shard import ShardedModel
from lamella_engine.slots import BoundSlot


def materialise_root(built: Architecture, sharded: ShardedModel, device: torch.device) -> None:
    """Give the modules outside the layers their weights, and every module its computed buffers, on `device`.

    The embedding table stays in host memory where the head does not share it: a sweep needs a few rows of it only.
    Buffers that no checkpoint stores (rotary frequencies, embedding scales) are computed by the model's own
    initialisation; the flag on the parameters keeps that from touching weights.
    """
    model = built.model
    LayerBinding(model, sharded.root).bind(BoundSlot(0, read_shard(sharded.root)))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_table_shared = head is None or head.weight.is_meta  # a tied head has no bytes of its own
    on_host = embedding if device.type != "cpu" and not is_table_shared else None
    for module in model.modules():
        place = torch.device("cpu") if module is on_host else device
        for name, weight in list(module._parameters.items()):
            if weight is not None and not weight.is_meta:
                module._parameters[name] = nn.Parameter(weight.to(place), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(place)
    if on_host is not None:
        _look_up_on_host(on_host, device)
    model.tie_weights()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    owners = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        owner = owners[path] = model.get_submodule(path)
        owner._buffers[leaf] = torch.empty_like(buffer, device="cpu" if owner is on_host else device)
    for owner in owners.values():
        model._init_weights(owner)


def _look_up_on_host(embedding: nn.Module, device: torch.device) -> None:
    """Let `embedding`, whose table is in host memory, take token ids from `device` and give rows to it."""

    def bring_ids(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(ids.cpu() for ids in args)

    def send_rows(module: nn.Module, args: tuple[torch.Tensor, ...], rows: torch.Tensor) -> torch.Tensor:
        return rows.to(device)

    embedding.register_forward_pre_hook(bring_ids)
    embedding.register_forward_hook(send_rows)
