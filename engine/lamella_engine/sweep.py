"""One sweep: every layer of the model passes the compute device once, for all packed sequences together.

Owns the model in memory: what lies outside the layers stays resident, each layer's weights are bound as its bytes
arrive and let go when it has run. `Model.forward` of transformers is kept as it is; hooks on the layers do the rest.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import nn

from lamella_engine import architecture
from lamella_engine.attention import IMPLEMENTATION, sweep_attention
from lamella_engine.binding import TORCH_DTYPES, LayerBinding
from lamella_engine.errors import EngineError
from lamella_engine.kv_cache import KVCache
from lamella_engine.packing import PackedSweep
from lamella_engine.resident import materialise_root
from lamella_engine.shard import ShardedModel
from lamella_engine.slots import open_layer_slots


class SweepModel:
    """A model whose layers stream; used by one thread at a time, closed by its owner.

    Attributes:
        sharded: the shards it runs from.
        streamed_bytes_per_sweep: weight bytes that one sweep reads from them.
        device, dtype: where and in which type it computes.
        config: the text model's transformers config.
    """

    def __init__(self, sharded: ShardedModel, device: torch.device, dtype: str | None, ring_slots: int) -> None:
        self.sharded = sharded
        self.streamed_bytes_per_sweep = sum(shard.nbytes for shard in sharded.layers)
        self.device = device
        self.dtype = TORCH_DTYPES[dtype or sharded.dtype]
        built = architecture.build(architecture.load_config(sharded.directory), self.dtype)
        self.config = built.config
        self.family = built.family
        self._model = built.model
        self._model.set_attn_implementation(IMPLEMENTATION)
        self._keeps_rows = "logits_to_keep" in signature(self._model.forward).parameters
        self._windows = architecture.sliding_windows(built.config, len(built.layers))
        self._layers_run = 0
        self._is_interrupted = False  # a sweep failed half-way, the slots are not at the first layer
        materialise_root(built, sharded, device)
        self._bindings = [LayerBinding(layer, shard) for layer, shard in zip(built.layers, sharded.layers, strict=True)]
        self._slots = open_layer_slots(sharded.layers, ring_slots, device)
        for index, layer in enumerate(built.layers):
            layer.register_forward_pre_hook(self._arrive(index))
            layer.register_forward_hook(self._leave(index))

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
                **({"logits_to_keep": pack.last_rows} if self._keeps_rows else {}),
            )
            if self._layers_run != len(self._bindings):
                raise EngineError(f"the model ran {self._layers_run} of its {len(self._bindings)} layers in this sweep")
            logits: torch.Tensor = output.logits[0] if self._keeps_rows else output.logits[0, pack.last_rows]
        self._is_interrupted = False
        return logits.float()

    def close(self) -> None:
        """Stop reading and drop the weights; idempotent."""
        self._slots.close()
        for binding in self._bindings:
            binding.unbind()

    def _arrive(self, index: int) -> Any:
        binding = self._bindings[index]

        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            binding.bind(self._slots.acquire(index))

        return hook

    def _leave(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            self._slots.release()
            self._layers_run += 1

        return hook
