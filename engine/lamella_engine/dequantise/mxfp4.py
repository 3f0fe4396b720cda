"""MXFP4 experts, as gpt-oss publishes them: four-bit floats in blocks of 32 under one exponent of two.

Expanded by transformers' own function, an expert at a time, so that the values are those of its full load.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lamella_engine.dequantise.expansion import ExpandedTensor, Expansion, PackedWeights, expansion
from lamella_engine.dequantise.settings import Settings
from lamella_engine.errors import CheckpointError

_BLOCKS, _SCALES = "_blocks", "_scales"


def describe(values: Settings) -> str:
    """Say what the format is; it has no settings that matter."""
    return "mxfp4"


def expand(packed: PackedWeights) -> Expansion:
    """Expand ``*_blocks`` [experts, out, groups, 16] with ``*_scales`` [experts, out, groups] to [experts, in, out]."""
    tensors = [_expert_stack(packed, name) for name in packed.tensors if name.endswith(_BLOCKS)]
    return expansion(packed, describe(packed.settings), tensors)


def _expert_stack(packed: PackedWeights, blocks_name: str) -> ExpandedTensor:
    name = blocks_name.removesuffix(_BLOCKS)
    scales_name = name + _SCALES
    blocks, scales = packed.tensors[blocks_name], packed.entry(scales_name, name)
    if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape or {blocks.dtype, scales.dtype} != {"uint8"}:
        raise CheckpointError(
            f"{blocks_name!r} {blocks.dtype} {list(blocks.shape)} and {scales_name!r} {scales.dtype} "
            f"{list(scales.shape)} do not make up mxfp4 experts; fetch the checkpoint again"
        )
    experts, out_features, groups, half_block = blocks.shape
    shape = (experts, groups * half_block * 2, out_features)
    return ExpandedTensor(
        name, shape, (blocks_name, scales_name), partial(_run, packed, blocks_name, scales_name, shape)
    )


def _run(packed: PackedWeights, blocks_name: str, scales_name: str, shape: tuple[int, ...]) -> torch.Tensor:
    blocks, scales = packed.read(blocks_name), packed.read(scales_name)
    result = torch.empty(shape, dtype=packed.dtype)
    for expert in range(shape[0]):
        one = slice(expert, expert + 1)
        result[one] = convert_moe_packed_tensors(blocks[one], scales[one], dtype=packed.dtype)
    return result
