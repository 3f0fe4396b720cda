"""Float8 weights with scales beside them: fine-grained fp8 (DeepSeek-V3, Qwen3, Mistral 3), fbgemm, modelopt.

Values are multiplied by their scales in float32 and rounded once. Activations that the checkpoint's makers would round
to float8 as well are computed in full.
"""

from __future__ import annotations

from functools import partial

import torch

from lamella_engine.dequantise import settings
from lamella_engine.dequantise.expansion import ExpandedTensor, Expansion, PackedWeights, expansion
from lamella_engine.dequantise.scale_grid import Block, as_grid, fit_grid, multiply
from lamella_engine.dequantise.settings import Settings
from lamella_engine.errors import CheckpointError

FLOAT8 = frozenset({"float8_e4m3fn", "float8_e5m2"})
_FINE_GRAINED_SCALES = (("_scale_inv", ""), (".scale", ".weight"), (".qscale_weight", ".weight"))
_PLAIN_SCALES = (("_scale", ""),)


def describe_fp8(values: Settings) -> str:
    """Check the settings of fine-grained fp8 and say what they mean."""
    block = settings.block_size(values, "weight_block_size")
    if settings.text(values, "activation_scheme", default="dynamic") not in ("dynamic", "static"):
        raise settings.refused(f"its activation_scheme is {values['activation_scheme']!r}")
    if settings.text(values, "expert_dtype", default="fp8") != "fp8":
        raise settings.refused(f"its experts are stored as {values['expert_dtype']!r}, only fp8 is read")
    return "fp8" if block is None else f"fp8 in blocks of {block[0]}x{block[1]}"


def expand_fp8(packed: PackedWeights) -> Expansion:
    """Expand ``weight`` with ``weight_scale_inv``."""
    block = settings.block_size(packed.settings, "weight_block_size")
    return expansion(packed, describe_fp8(packed.settings), pairs(packed, _FINE_GRAINED_SCALES, block))


def describe_fbgemm(values: Settings) -> str:
    """Check the settings of fbgemm's fp8 and say what they mean."""
    return "fp8, a scale a row"


def expand_fbgemm(packed: PackedWeights) -> Expansion:
    """Expand ``weight`` with ``weight_scale``."""
    return expansion(packed, describe_fbgemm(packed.settings), pairs(packed, _PLAIN_SCALES, None))


def describe_modelopt(values: Settings) -> str:
    """Check the settings of modelopt and say what they mean."""
    algorithm = settings.text(values, "quant_algo", default="none")
    if algorithm not in ("fp8", "fp8_per_channel_per_token"):
        raise settings.refused(f"its quant_algo is {values.get('quant_algo')!r}, only FP8 is read")
    return "fp8, a scale a tensor" if algorithm == "fp8" else "fp8, a scale a row"


def expand_modelopt(packed: PackedWeights) -> Expansion:
    """Expand ``weight`` with ``weight_scale``."""
    return expansion(packed, describe_modelopt(packed.settings), pairs(packed, _PLAIN_SCALES, None))


def pairs(packed: PackedWeights, suffixes: tuple[tuple[str, str], ...], block: Block | None) -> list[ExpandedTensor]:
    """Every float8 tensor that has scales under one of `suffixes` (of the scales, of the weight)."""
    found = []
    for scale_name in packed.tensors:
        for scale_suffix, weight_suffix in suffixes:
            if not scale_name.endswith(scale_suffix):
                continue
            name = scale_name.removesuffix(scale_suffix) + weight_suffix
            if name in packed.tensors and packed.tensors[name].dtype in FLOAT8:
                found.append(scaled(packed, name, scale_name, block))
    return found


def scaled(
    packed: PackedWeights, name: str, scale_name: str, block: Block | None, through: torch.dtype | None = None
) -> ExpandedTensor:
    """`name` multiplied by `scale_name`; see `scale_grid.multiply` for `through`.

    Raises:
        CheckpointError: they do not fit.
    """
    shape, scales = packed.tensors[name].shape, packed.tensors[scale_name]
    grid = as_grid(shape, scales.shape)
    # Some tensors of a blocked checkpoint have scales of another kind, which their shape tells.
    is_blocked = block is not None and _is_covered(shape, grid, block)
    fitted = fit_grid(name, shape, grid, block if is_blocked else None)
    if scales.dtype not in ("float32", "bfloat16", "float16", "uint8", "float8_e8m0fnu"):
        raise CheckpointError(f"the scales {scale_name!r} have the type {scales.dtype}, which is none of scales")
    return ExpandedTensor(
        name, shape, (name, scale_name), partial(_run, packed, (name, scale_name), grid, fitted, through)
    )


def _is_covered(shape: tuple[int, ...], grid: tuple[int, ...], block: Block) -> bool:
    return len(shape) >= 2 and grid[-2:] == (-(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _run(
    packed: PackedWeights,
    names: tuple[str, str],
    grid: tuple[int, ...],
    block: Block,
    through: torch.dtype | None,
) -> torch.Tensor:
    values, scales = (packed.read(name) for name in names)
    return multiply(values, scales.reshape(grid), block, packed.dtype, through=through)
