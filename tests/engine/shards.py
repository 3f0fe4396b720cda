"""Reads built shards back in tests, the way any other program would."""

from __future__ import annotations

import torch
from safetensors import safe_open

from lamella_engine import architecture
from lamella_engine.shard import ShardedModel


def stored_weights(model: ShardedModel) -> dict[str, torch.Tensor]:
    """All tensors of a built model under their full native names, read by safetensors itself.

    A layer that is read in place has its tensors under these names in the original's file.
    """
    built = architecture.build(architecture.load_config(model.directory), torch.float32)
    weights = {}
    prefixes = ["", *(f"{built.layers_path}.{index}." for index in range(len(model.layers)))]
    for prefix, shard in zip(prefixes, (model.root, *model.layers), strict=True):
        with safe_open(shard.path, "pt") as file:
            held = set(file.keys())
            for name in (spec.name for spec in shard.tensors):
                weights[prefix + name] = file.get_tensor(name if name in held else prefix + name)
    return weights


class Steps:
    """A progress callback that remembers (phase, bytes done, bytes in all)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        self.calls.append((phase, done_bytes, total_bytes))

    @property
    def phases(self) -> set[str]:
        return {call[0] for call in self.calls}
