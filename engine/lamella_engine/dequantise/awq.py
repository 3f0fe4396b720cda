"""AWQ in its gemm layout: four-bit numbers, eight in a word along the outputs, in an order of their own.

``weight[out, in] = (q[in, out] - zeros[in // group, out]) * scales[in // group, out]``; nothing is added to the zeros.
"""

from __future__ import annotations

from functools import partial

import torch

from lamella_engine.dequantise import settings
from lamella_engine.dequantise.expansion import ExpandedTensor, Expansion, PackedWeights, expansion
from lamella_engine.dequantise.scale_grid import multiply
from lamella_engine.dequantise.settings import Settings
from lamella_engine.errors import CheckpointError

_QWEIGHT = ".qweight"
_IN_A_WORD = 8


def describe(values: Settings) -> str:
    """Check the settings of AWQ and say what they mean.

    Raises:
        UnsupportedModel: bits or a layout that are not read.
    """
    bits, group_size = settings.whole(values, "bits", "w_bit"), settings.whole(values, "group_size", "q_group_size")
    layout = settings.text(values, "version", "format", default="gemm")
    if bits != 4:
        raise settings.refused(f"it has {bits} bits, AWQ is read with 4")
    if layout != "gemm" or settings.text(values, "backend", default="auto") == "llm-awq":
        raise settings.refused(f"its layout is {layout!r}, of AWQ only 'gemm' is read")
    if not settings.flag(values, "zero_point", default=True):
        raise settings.refused("it is AWQ without zero points")
    if group_size != -1 and group_size < 1:
        raise settings.refused(f"its group_size is {group_size}")
    return "awq, 4 bits, " + ("one group" if group_size == -1 else f"groups of {group_size}")


def expand(packed: PackedWeights) -> Expansion:
    """Expand ``qweight``, ``qzeros`` and ``scales``."""
    description = describe(packed.settings)
    tensors = [_linear(packed, name.removesuffix(_QWEIGHT)) for name in packed.tensors if name.endswith(_QWEIGHT)]
    return expansion(packed, description, tensors)


def _linear(packed: PackedWeights, path: str) -> ExpandedTensor:
    names = (f"{path}.qweight", f"{path}.qzeros", f"{path}.scales")
    qweight, qzeros, scales = (packed.entry(name, path) for name in names)
    if len(qweight.shape) != 2 or {qweight.dtype, qzeros.dtype} != {"int32"}:
        raise _misfit(path, f"qweight is {qweight.dtype} {list(qweight.shape)}")
    inputs, outputs = qweight.shape[0], qweight.shape[1] * _IN_A_WORD
    group_size = settings.whole(packed.settings, "group_size", "q_group_size")
    size = inputs if group_size == -1 else group_size
    groups = inputs // size
    if inputs % size or scales.shape != (groups, outputs) or qzeros.shape != (groups, qweight.shape[1]):
        raise _misfit(
            path,
            f"{inputs} inputs in groups of {size}, scales {list(scales.shape)}, qzeros {list(qzeros.shape)}, "
            f"{outputs} outputs",
        )
    return ExpandedTensor(f"{path}.weight", (outputs, inputs), names, partial(_run, packed, names, size))


def _run(packed: PackedWeights, names: tuple[str, str, str], group_size: int) -> torch.Tensor:
    qweight, qzeros, scales = (packed.read(name) for name in names)
    return multiply(
        _unpack(qweight).t().contiguous(), scales.t(), (1, group_size), packed.dtype, zeros=_unpack(qzeros).t()
    )  # fmt: skip


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, words] -> uint8 [rows, 8 * words]: the low half of a word holds its even outputs."""
    pairs = words.contiguous().view(torch.uint8)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1).reshape(*words.shape, 2, _IN_A_WORD // 2)
    return nibbles.transpose(-1, -2).reshape(words.shape[0], -1)


def _misfit(path: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the packed tensors of {path!r} do not fit together: {reason}. The settings and the weights do not belong "
        "together; fetch the checkpoint again"
    )
