"""compressed-tensors: packed whole numbers (1 to 8 bits), plain int8 and float8, with scales a tensor, row or group.

As the format's own library does, products are made in the type of the scales, then brought to the type that computes.
Weights whose makers also round activations to float8 are read and the activations computed in full; where activations
would be rounded to whole numbers, the results would differ by more than rounding, and the checkpoint is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from lamella_engine.dequantise import settings
from lamella_engine.dequantise.bit_packing import unpack_columns, unpack_rows, words_for
from lamella_engine.dequantise.expansion import ExpandedTensor, Expansion, PackedWeights, expansion
from lamella_engine.dequantise.float8 import FLOAT8
from lamella_engine.dequantise.scale_grid import Block, as_grid, fit_grid, multiply
from lamella_engine.dequantise.settings import Settings
from lamella_engine.errors import CheckpointError

_PACKED, _SCALE = ".weight_packed", ".weight_scale"
_FORMATS = frozenset({"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense"})
_STRATEGIES = frozenset({"tensor", "channel", "group", "block"})


@dataclass(frozen=True)
class _Scheme:
    """How the weights of some modules are quantised.

    `targets` are names of modules, patterns of them after ``re:``, or names of classes, of which only linear layers
    matter. `block` is told by the strategy: None where one scale serves the tensor or the row.
    """

    targets: tuple[str, ...]
    format: str
    bits: int
    kind: str
    strategy: str
    group_size: int
    block: Block | None

    @property
    def description(self) -> str:
        extent = {"group": f"groups of {self.group_size}", "tensor": "a scale a tensor", "channel": "a scale a row"}
        size = extent.get(self.strategy) or (f"blocks of {self.block[0]}x{self.block[1]}" if self.block else "blocks")
        return f"{self.kind}{self.bits}, {size}"


def describe(values: Settings) -> str:
    """Check the settings of compressed-tensors and say what they mean.

    Raises:
        UnsupportedModel: something of them is not read, or could not be exact without rounding activations.
    """
    return "compressed-tensors, " + ("; ".join(dict.fromkeys(s.description for s in _schemes(values))) or "dense")


def expand(packed: PackedWeights) -> Expansion:
    """Expand ``weight_packed`` or ``weight`` with ``weight_scale`` and, if there is one, ``weight_zero_point``."""
    schemes = _schemes(packed.settings)
    return expansion(packed, describe(packed.settings), _linears(packed, schemes))


def _linears(packed: PackedWeights, schemes: tuple[_Scheme, ...]) -> Iterator[ExpandedTensor]:
    for name in packed.tensors:
        if name.endswith(_PACKED):
            path = name.removesuffix(_PACKED)
            yield _packed_linear(packed, path, _scheme_of(path, schemes))
        elif name.endswith(_SCALE) and f"{name.removesuffix(_SCALE)}.weight" in packed.tensors:
            path = name.removesuffix(_SCALE)
            if packed.tensors[f"{path}.weight"].dtype in FLOAT8 | {"int8"}:
                yield _plain_linear(packed, path, _scheme_of(path, schemes))


def _schemes(values: Settings) -> tuple[_Scheme, ...]:
    if settings.section(values, "transform_config"):
        raise settings.refused("its activations are transformed while it runs (transform_config)")
    if settings.text(settings.section(values, "sparsity_config"), "format", default="dense") != "dense":
        raise settings.refused("its weights are stored sparse (sparsity_config)")
    groups = settings.section(values, "config_groups")
    return tuple(_scheme(settings.section(groups, name), values) for name in groups)


def _scheme(group: Settings, values: Settings) -> _Scheme:
    layout = settings.text(group, "format") or settings.text(values, "format", default="dense")
    if layout not in _FORMATS:
        raise settings.refused(
            f"its format is {layout!r}, of compressed-tensors {', '.join(sorted(_FORMATS))} are read"
        )
    for kind in ("input_activations", "output_activations"):
        activations = settings.section(group, kind)
        if activations and settings.text(activations, "type", default="int") != "float":
            bits = settings.whole(activations, "num_bits", default=8)
            raise settings.refused(
                f"its {kind.replace('_', ' ')} are rounded to int{bits} while it runs, without which it would not be "
                "exact"
            )
    weights = settings.section(group, "weights")
    bits, size = settings.whole(weights, "num_bits", default=8), settings.whole(weights, "group_size", default=0)
    kind = settings.text(weights, "type", default="int")
    strategy = settings.text(weights, "strategy") or ("tensor" if not size else "channel" if size == -1 else "group")
    block = settings.block_size(weights, "block_structure")
    if strategy not in _STRATEGIES or (strategy == "group") != (size > 0) or (strategy == "block" and block is None):
        raise settings.refused(f"its weights are quantised by {strategy!r} with group_size {size}")
    if kind not in ("int", "float") or not 1 <= bits <= 8 or (kind == "float" and bits != 8):
        raise settings.refused(
            f"its weights are of type {kind}{bits}; float8 and whole numbers of 1 to 8 bits are read"
        )
    return _Scheme(
        settings.texts(group, "targets"), layout, bits, kind, strategy, size, block if strategy == "block" else None
    )


def _scheme_of(path: str, schemes: tuple[_Scheme, ...]) -> _Scheme:
    """The scheme that names the module, else one whose pattern fits it, else one for its class."""
    for fits in (_is_named, _fits_pattern, _is_for_classes):
        for scheme in schemes:
            if any(fits(target, path) for target in scheme.targets):
                return scheme
    raise settings.refused(f"none of its config_groups is for {path!r}, which is quantised")


def _is_named(target: str, path: str) -> bool:
    return target == path or path.endswith(f".{target}")


def _fits_pattern(target: str, path: str) -> bool:
    try:
        return target.startswith("re:") and re.match(target.removeprefix("re:"), path) is not None
    except re.error as error:
        raise settings.refused(f"its target {target!r} is not a pattern ({error})") from error


def _is_for_classes(target: str, path: str) -> bool:
    return not target.startswith("re:") and "." not in target


def _packed_linear(packed: PackedWeights, path: str, scheme: _Scheme) -> ExpandedTensor:
    entry = packed.tensors[path + _PACKED]
    shape = _stored_shape(packed, path)
    if scheme.kind != "int" or entry.dtype != "int32" or len(entry.shape) != 2:
        raise _misfit(path, f"weight_packed is {entry.dtype} {list(entry.shape)} of {scheme.description}")
    if entry.shape != (shape[0], words_for(shape[1], scheme.bits)):
        raise _misfit(
            path,
            f"weight_packed {list(entry.shape)} does not hold {shape[0]} x {shape[1]} numbers of {scheme.bits} bits",
        )
    return _linear(packed, path, scheme, _PACKED, shape)


def _plain_linear(packed: PackedWeights, path: str, scheme: _Scheme) -> ExpandedTensor:
    entry = packed.tensors[f"{path}.weight"]
    if (entry.dtype == "int8") != (scheme.kind == "int"):
        raise _misfit(path, f"weight is {entry.dtype}, the settings say {scheme.description}")
    return _linear(packed, path, scheme, ".weight", entry.shape)


def _linear(
    packed: PackedWeights, path: str, scheme: _Scheme, values_suffix: str, shape: tuple[int, ...]
) -> ExpandedTensor:
    scale = packed.entry(path + _SCALE, path)
    grid = as_grid(shape, scale.shape)
    block = _block(path, scheme, shape)
    fit_grid(f"{path}.weight", shape, grid, block)
    parts = [path + values_suffix, path + _SCALE]
    optional = [f"{path}.{part}" for part in ("weight_zero_point", "weight_g_idx", "weight_shape")]
    parts += [name for name in optional if name in packed.tensors]
    _check_zeros(packed, path, scheme, grid, shape[0])
    run = partial(_run, packed, path, scheme, (parts[0], shape, grid, block))
    return ExpandedTensor(f"{path}.weight", shape, tuple(parts), run)


def _block(path: str, scheme: _Scheme, shape: tuple[int, ...]) -> Block:
    if len(shape) != 2:
        raise _misfit(path, f"the weight has the shape {list(shape)}, which is no matrix")
    rows, columns = shape
    if scheme.strategy == "group" and columns % scheme.group_size:
        raise _misfit(path, f"groups of {scheme.group_size} do not divide {columns} inputs")
    if scheme.block is not None:
        return scheme.block
    return {"tensor": (rows, columns), "channel": (1, columns)}.get(scheme.strategy, (1, scheme.group_size))


def _check_zeros(packed: PackedWeights, path: str, scheme: _Scheme, grid: tuple[int, ...], rows: int) -> None:
    zeros = packed.tensors.get(f"{path}.weight_zero_point")
    if zeros is None:
        return
    is_packed = zeros.dtype == "int32" and zeros.shape == (words_for(rows, scheme.bits), grid[-1])
    if not is_packed and not (zeros.dtype == "int8" and as_grid((rows, 1), zeros.shape)[-2:] in (grid, (1, 1))):
        raise _misfit(path, f"weight_zero_point is {zeros.dtype} {list(zeros.shape)} beside scales {list(grid)}")


def _stored_shape(packed: PackedWeights, path: str) -> tuple[int, int]:
    name = f"{path}.weight_shape"
    entry = packed.entry(name, path)
    if entry.shape != (2,) or entry.dtype not in ("int64", "int32"):
        raise _misfit(path, f"weight_shape is {entry.dtype} {list(entry.shape)}, not two whole numbers")
    rows, columns = (int(side) for side in packed.read(name).tolist())
    if rows < 1 or columns < 1:
        raise _misfit(path, f"weight_shape is {rows} x {columns}")
    return rows, columns


def _run(
    packed: PackedWeights, path: str, scheme: _Scheme, plan: tuple[str, tuple[int, ...], tuple[int, ...], Block]
) -> torch.Tensor:
    values_name, shape, grid, block = plan
    scales = packed.read(path + _SCALE)
    values, zeros = packed.read(values_name), _zeros(packed, path, scheme, grid, shape[0])
    if values_name.endswith(_PACKED):
        values = unpack_columns(values, scheme.bits, shape[1])
        middle = 1 << (scheme.bits - 1)  # packed numbers are moved up by this, to be positive
        zeros = torch.full(grid, middle) if zeros is None else zeros + middle
    return multiply(
        values, scales.reshape(grid), block, packed.dtype,
        zeros=zeros, groups=_groups(packed, path, grid), through=scales.dtype,
    )  # fmt: skip


def _zeros(packed: PackedWeights, path: str, scheme: _Scheme, grid: tuple[int, ...], rows: int) -> torch.Tensor | None:
    name = f"{path}.weight_zero_point"
    if name not in packed.tensors:
        return None
    zeros = packed.read(name)
    if zeros.dtype == torch.int32:
        return unpack_rows(zeros, scheme.bits, rows).to(torch.int16) - (1 << (scheme.bits - 1))
    return zeros.to(torch.int16).expand(grid) if zeros.numel() == 1 else zeros.to(torch.int16).reshape(grid)


def _groups(packed: PackedWeights, path: str, grid: tuple[int, ...]) -> torch.Tensor | None:
    name = f"{path}.weight_g_idx"
    if name not in packed.tensors:
        return None
    groups = packed.read(name).to(torch.int64)
    if bool((groups == -1).any()):
        return None  # the format's way to say that the groups are in order
    if int(groups.min()) < 0 or int(groups.max()) >= grid[-1]:
        raise _misfit(path, "weight_g_idx names groups that are not there")
    return groups


def _misfit(path: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the packed tensors of {path!r} do not fit together: {reason}. The settings and the weights do not belong "
        "together; fetch the checkpoint again"
    )
