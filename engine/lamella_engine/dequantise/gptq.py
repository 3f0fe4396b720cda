"""GPTQ: whole numbers of 2, 3, 4 or 8 bits packed along the inputs, a scale and a zero point a group and output.

``weight[out, in] = scales[group(in), out] * (q[in, out] - zeros[group(in), out])``. The first version of the format
stores each zero point less one, modulo 2^bits; ``gptq_v2`` stores it as it is. With ``desc_act`` the group of each
input is told by ``g_idx``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from lamella_engine.dequantise import settings
from lamella_engine.dequantise.bit_packing import unpack_columns, unpack_rows, words_for
from lamella_engine.dequantise.expansion import ExpandedTensor, Expansion, PackedWeights, expansion
from lamella_engine.dequantise.scale_grid import multiply
from lamella_engine.dequantise.settings import Settings
from lamella_engine.errors import CheckpointError

_BITS = (2, 3, 4, 8)
_QWEIGHT = ".qweight"


@dataclass(frozen=True)
class _Linear:
    """One packed projection: `path` is its module's name; `group_size` inputs share a scale."""

    path: str
    inputs: int
    outputs: int
    bits: int
    group_size: int
    zero_offset: int
    is_ordered: bool

    @property
    def names(self) -> tuple[str, ...]:
        parts = ("qweight", "qzeros", "scales", *(() if self.is_ordered else ("g_idx",)))
        return tuple(f"{self.path}.{part}" for part in parts)


def describe(values: Settings) -> str:
    """Check the settings of GPTQ and say what they mean.

    Raises:
        UnsupportedModel: bits, layout or per-module settings that are not read.
    """
    bits, group_size = settings.whole(values, "bits"), settings.whole(values, "group_size", default=-1)
    if bits not in _BITS:
        raise settings.refused(f"it has {bits} bits, GPTQ is read with {', '.join(map(str, _BITS))}")
    if group_size != -1 and group_size < 1:
        raise settings.refused(f"its group_size is {group_size}")
    layout = settings.text(values, "checkpoint_format", "format", default="gptq")
    if layout not in ("gptq", "gptq_v2") or settings.flag(values, "is_marlin_format"):
        raise settings.refused(f"its layout is {layout if layout not in ('gptq', 'gptq_v2') else 'marlin'!r}, of GPTQ "
                               "only 'gptq' and 'gptq_v2' are read")  # fmt: skip
    rules = settings.section(values, "dynamic")
    if any(not rule.startswith("-:") for rule in rules):
        raise settings.refused("its 'dynamic' settings give modules bits and groups of their own")
    return f"gptq, {bits} bits, " + ("one group" if group_size == -1 else f"groups of {group_size}")


def expand(packed: PackedWeights) -> Expansion:
    """Expand ``qweight``, ``qzeros``, ``scales`` and, where they are out of order, ``g_idx``."""
    description = describe(packed.settings)
    tensors = []
    for name in packed.tensors:
        if name.endswith(_QWEIGHT):
            linear = _linear(packed, name.removesuffix(_QWEIGHT))
            shape = (linear.outputs, linear.inputs)
            # g_idx is used up with the others, also where it says nothing new.
            used = tuple(dict.fromkeys((*linear.names, *(n for n in (f"{linear.path}.g_idx",) if n in packed.tensors))))
            tensors.append(ExpandedTensor(f"{linear.path}.weight", shape, used, partial(_run, packed, linear)))
    return expansion(packed, description, tensors)


def _linear(packed: PackedWeights, path: str) -> _Linear:
    bits, group_size = (
        settings.whole(packed.settings, "bits"),
        settings.whole(packed.settings, "group_size", default=-1),
    )
    qweight, qzeros, scales = (packed.entry(f"{path}.{part}", path) for part in ("qweight", "qzeros", "scales"))
    order = packed.tensors.get(f"{path}.g_idx")
    if len(qweight.shape) != 2 or len(qzeros.shape) != 2 or len(scales.shape) != 2:
        raise _misfit(path, "they are not matrices")
    groups, outputs = scales.shape
    inputs = order.shape[0] if order is not None and order.shape else qweight.shape[0] * 32 // bits
    size = inputs if group_size == -1 else group_size
    if qweight.shape != (words_for(inputs, bits), outputs) or {qweight.dtype, qzeros.dtype} != {"int32"}:
        raise _misfit(path, f"qweight {list(qweight.shape)} is not {inputs} x {outputs} numbers of {bits} bits")
    if groups != -(-inputs // size):
        raise _misfit(path, f"{inputs} inputs in groups of {size} need other than {groups} groups")
    if qzeros.shape != (groups, words_for(outputs, bits)):
        raise _misfit(path, f"qzeros {list(qzeros.shape)} is not {groups} x {outputs} numbers of {bits} bits")
    is_first = settings.text(packed.settings, "checkpoint_format", "format", default="gptq") == "gptq"
    return _Linear(path, inputs, outputs, bits, size, int(is_first), order is None)


def _run(packed: PackedWeights, linear: _Linear) -> torch.Tensor:
    qweight, qzeros, scales, *order = (packed.read(name) for name in linear.names)
    numbers = unpack_rows(qweight, linear.bits, linear.inputs)
    zeros = unpack_columns(qzeros, linear.bits, linear.outputs)
    zeros = (zeros.to(torch.int16) + linear.zero_offset) & ((1 << linear.bits) - 1)
    groups = None
    if order:
        groups = order[0].to(torch.int64)
        if int(groups.min()) < 0 or int(groups.max()) >= scales.shape[0]:
            raise _misfit(linear.path, "g_idx names groups that are not there")
        if torch.equal(groups, torch.arange(linear.inputs) // linear.group_size):
            groups = None
    return multiply(
        numbers.t(), scales.t(), (1, linear.group_size), packed.dtype, zeros=zeros.t(), groups=groups
    )  # fmt: skip


def _misfit(path: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the packed tensors of {path!r} do not fit together: {reason}. The settings and the weights do not belong "
        "together; fetch the checkpoint again"
    )
