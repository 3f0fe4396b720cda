"""In which type a model computes on a device: as stored where the device can, else the nearest that it can.

Old cards have no bfloat16 units. float16 has its bytes and, with sums in float32, its speed, but not its range, which
some families leave; those compute in float32, from weights that still move in two bytes.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

BFLOAT16_CAPABILITY = (8, 0)  # Ampere
# Their activations pass 65504, the largest float16; see the model cards and transformers' own float16 exceptions.
LEAVES_FLOAT16 = ("gemma", "recurrent_gemma", "t5", "cohere", "olmo", "phi", "qwen2", "qwen3", "gpt_oss")


def choose_dtype(wanted: torch.dtype | None, stored: torch.dtype, device: torch.device, family: str) -> torch.dtype:
    """The compute type: `wanted` if given, else by what the weights are `stored` in and what `device` can do."""
    if wanted is not None:
        return wanted
    if device.type == "cpu":
        return _on_cpu(stored)
    if stored is not torch.bfloat16:
        return stored
    return on_card(torch.cuda.get_device_capability(device), family)


def _on_cpu(stored: torch.dtype) -> torch.dtype:
    """A half type only where the processor multiplies in it; elsewhere it is emulated, several times slower."""
    if stored is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    if stored is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return stored


def on_card(capability: tuple[int, int], family: str) -> torch.dtype:
    """The compute type of bfloat16 weights of `family` on a card of that compute capability."""
    if capability >= BFLOAT16_CAPABILITY:
        return torch.bfloat16
    chosen = torch.float32 if family.startswith(LEAVES_FLOAT16) else torch.float16
    logger.warning(
        "this card (capability %d.%d) has no bfloat16: %s computes in %s; the engine option dtype changes that",
        *capability, family, chosen,
    )  # fmt: skip
    return chosen
