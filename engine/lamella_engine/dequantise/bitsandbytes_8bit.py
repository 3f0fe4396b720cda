"""bitsandbytes, eight bits: int8 rows, each with the largest absolute value (``SCB``) that 127 stands for."""

from __future__ import annotations

from functools import partial

import torch

from lamella_engine.dequantise.expansion import ExpandedTensor, PackedWeights
from lamella_engine.dequantise.scale_grid import row_parts
from lamella_engine.errors import CheckpointError, UnsupportedModel

_MAXIMA = ".SCB"
_PER_STEP = 7.874015718698502e-3  # bitsandbytes' own float of 1 / 127


def linears(packed: PackedWeights) -> list[ExpandedTensor]:
    """Every weight that has an ``SCB`` beside it.

    Raises:
        CheckpointError: the two do not fit.
        UnsupportedModel: rows are laid out for one kind of card.
    """
    return [_linear(packed, name.removesuffix(_MAXIMA)) for name in packed.tensors if name.endswith(_MAXIMA)]


def _linear(packed: PackedWeights, path: str) -> ExpandedTensor:
    names = [f"{path}.weight", path + _MAXIMA]
    weight, maxima = (packed.entry(name, path) for name in names)
    if weight.dtype != "int8" or len(weight.shape) != 2 or maxima.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{names[0]!r} ({weight.dtype} {list(weight.shape)}) and {names[1]!r} ({maxima.dtype} "
            f"{list(maxima.shape)}) are not packed as bitsandbytes packs; fetch the checkpoint again"
        )
    layout = f"{path}.weight_format"
    if layout in packed.tensors:
        names.append(layout)
        if int(packed.read(layout).reshape(-1)[0]) != 0:
            raise UnsupportedModel(
                f"{path!r} is laid out for one kind of card; only rows are read. Save the checkpoint again with a "
                "current bitsandbytes, or use the unquantised one"
            )
    return ExpandedTensor(names[0], weight.shape, tuple(names), partial(_run, packed, (names[0], names[1])))


def _run(packed: PackedWeights, names: tuple[str, str]) -> torch.Tensor:
    weight, maxima = (packed.read(name) for name in names)
    result = torch.empty(weight.shape, dtype=packed.dtype)
    for part in row_parts(*weight.shape):
        result[part] = weight[part] * maxima[part].to(torch.float32).view(-1, 1) * _PER_STEP
    return result
