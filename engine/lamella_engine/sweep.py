"""One sweep: every layer of the model passes the compute device once, for all packed sequences together.

Owns the model in memory: what lies outside the layers stays resident, each layer's weights are bound as its bytes
arrive and let go when it has run. `Model.forward` of transformers is kept as it is; hooks on the layers do the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamella_engine import architecture
from lamella_engine.attention import IMPLEMENTATION, sweep_attention
from lamella_engine.binding import TORCH_DTYPES, LayerBinding
from lamella_engine.errors import EngineError
from lamella_engine.kv_cache import KVCache
from lamella_engine.packing import PackedSweep
from lamella_engine.reader import read_shard
from lamella_engine.shard import ShardedModel
from lamella_engine.slots import BoundSlot, open_layer_slots


class SweepModel:
    """A model whose layers stream; used by one thread at a time, closed by its owner.

    Attributes:
        sharded: the shards it runs from.
        device, dtype: where and in which type it computes.
        config: the text model's transformers config.
    """

    def __init__(self, sharded: ShardedModel, device: torch.device, dtype: str | None, ring_slots: int) -> None:
        self.sharded = sharded
        self.device = device
        self.dtype = TORCH_DTYPES[dtype or sharded.dtype]
        built = architecture.build(architecture.load_config(sharded.directory), self.dtype)
        self.config = built.config
        self.family = built.family
        self._model = built.model
        self._model.set_attn_implementation(IMPLEMENTATION)
        self._windows = architecture.sliding_windows(built.config, len(built.layers))
        self._layers_run = 0
        self._is_interrupted = False  # a sweep failed half-way, the slots are not at the first layer
        materialise_root(built, sharded, device)
        self._bindings = [LayerBinding(layer, shard) for layer, shard in zip(built.layers, sharded.layers, strict=True)]
        self._slots = open_layer_slots(sharded.layers, ring_slots, device)
        for index, layer in enumerate(built.layers):
            layer.register_forward_pre_hook(self._arrive(index), with_kwargs=True)
            layer.register_forward_hook(self._leave(index), with_kwargs=True)

    def run(self, pack: PackedSweep, cache: KVCache) -> torch.Tensor:
        """Run one sweep, from the first layer whatever became of the one before.

        Returns:
            Logits of each span's last token, float32 [number of spans, vocabulary], in pack order.

        Raises:
            ShardError: a shard could not be read.
            EngineError: the model did not call its layers once each, in order.
        """
        if self._is_interrupted:
            self._slots.rewind()
        self._is_interrupted = True
        self._layers_run = 0
        with torch.inference_mode(), sweep_attention(pack, cache, self._windows):
            output = self._model(
                input_ids=pack.input_ids,
                position_ids=pack.position_ids,
                use_cache=False,
                logits_to_keep=pack.last_rows,
            )
            if self._layers_run != len(self._bindings):
                raise EngineError(f"the model ran {self._layers_run} of its {len(self._bindings)} layers in this sweep")
            logits: torch.Tensor = output.logits[0].float()
        self._is_interrupted = False
        return logits

    @property
    def streamed_bytes_per_sweep(self) -> int:
        """Weight bytes that one sweep reads from the shards."""
        return sum(shard.nbytes for shard in self.sharded.layers)

    def close(self) -> None:
        """Stop reading and drop the weights; idempotent."""
        self._slots.close()
        for binding in self._bindings:
            binding.unbind()

    def _arrive(self, index: int) -> Any:
        binding = self._bindings[index]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, object]) -> None:
            binding.bind(self._slots.acquire(index))

        return hook

    def _leave(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, object], output: object) -> None:
            self._slots.release()
            self._layers_run += 1

        return hook


def materialise_root(built: architecture.Architecture, sharded: ShardedModel, device: torch.device) -> None:
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
