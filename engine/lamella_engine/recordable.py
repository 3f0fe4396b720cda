"""Which layers are not recorded as graphs because of their experts: those that cannot be, or are faster if they ask.

Owns what is known of torch and transformers in this, and one comparison of seconds. Neighbours: `experts`; `open_model`
asks, `layer_graphs` records.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lamella_engine.experts import ExpertBytes

RECORDING_SAVES_S = 1e-3
"""Of a layer that is launched kernel by kernel: 1.15 ms instead of 0.3 at most, measured on an H100 at one token."""

_GROUPED_KERNEL = (9, 10)  # major compute capabilities for which torch has one, of bfloat16 alone


def find_unrecorded(
    layers: Iterable[nn.Module],
    experts: Sequence[ExpertBytes | None],
    expanded_bytes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    device_memory: float,
) -> frozenset[int]:
    """Numbers of the layers to launch kernel by kernel.

    Args:
        layers: the model's.
        experts: of each layer, those that can be told apart.
        expanded_bytes: of each layer, what all experts expand to in every sweep if it is recorded; 0 where they do not.
        device, dtype: that they compute on and in.
        device_memory: bytes a second.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return frozenset(
        number
        for number, (layer, own, nbytes) in enumerate(zip(layers, experts, expanded_bytes, strict=True))
        if waits_when_routed(layer, dtype, capability)
        or (own is not None and nbytes and expands_visited(own, nbytes, device_memory))
    )


def waits_when_routed(layer: nn.Module, dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether the experts of `layer` make the host wait for their routing, so that nothing of it can be recorded.

    By default transformers multiplies by torch's grouped product. Its kernel leaves the groups' ends on the device;
    where it is missing, torch or transformers copy them to the host.

    Args:
        layer: one of the model's.
        dtype: that it computes in.
        capability: of the CUDA device that it computes on; None where it computes elsewhere.
    """
    owners = [module for module in layer.modules() if hasattr(module, "_is_expert_parallel")]
    if capability is None or not owners:
        return False
    ways = {str(getattr(getattr(module, "config", None), "_experts_implementation", None)) for module in owners}
    has_kernel = dtype is torch.bfloat16 and capability[0] in _GROUPED_KERNEL
    return "eager" in ways or ("grouped_mm" in ways and not has_kernel)


def expands_visited(own: ExpertBytes, expanded_bytes: int, device_memory: float) -> bool:
    """Whether a layer that stays packed is faster if it asks which experts are visited and expands only those.

    A graph cannot ask, so it would expand all of them.

    Args:
        own: the layer's experts, as they are stored.
        expanded_bytes: that all of them take expanded.
        device_memory: bytes a second.
    """
    unvisited = 1.0 - own.routed / own.count
    return unvisited * (own.nbytes + expanded_bytes) / device_memory > RECORDING_SAVES_S
