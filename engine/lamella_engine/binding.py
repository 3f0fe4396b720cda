"""Turns a buffer of layer bytes into the parameters of a module, without copying.

A tensor of a shard becomes a view into the slot's buffer; binding is one assignment per tensor. Views are kept per
buffer, so a steady sweep allocates nothing. Where the compute dtype is not the stored one, what stays is converted once
and what streams is converted into one buffer that all layers share; of a layer that came without its experts, each
expert once it is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lamella_engine.errors import CheckpointError
from lamella_engine.formats import Format, find_format
from lamella_engine.shard import TENSOR_ALIGNMENT, TensorSpec
from lamella_engine.weight_stream import BoundSlot

_DTYPE_NAMES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES}


@dataclass(frozen=True)
class _Place:
    """Where one tensor goes: the dict of the owning module, the key in it, and the dtype the module computes in."""

    tensors: MutableMapping[str, Any]
    leaf: str
    spec: TensorSpec
    dtype: torch.dtype


@dataclass(frozen=True)
class _Stored:
    """A tensor as it lies in a buffer: `plain`, or if it is packed the `parts` that `format` expands, or `strips`."""

    shape: tuple[int, ...]
    plain: torch.Tensor
    format: Format | None = None
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    strips: tuple[_Stored, ...] = ()

    @classmethod
    def of(cls, data: torch.Tensor, spec: TensorSpec) -> _Stored:
        """The tensor that `spec` describes inside `data` (uint8, one shard's bytes)."""
        if spec.packed is None:
            return cls(spec.shape, tensor_view(data, spec))
        parts = {part.name: tensor_view(data, part) for part in spec.packed.parts}
        strips = tuple(cls.of(data, strip) for strip in spec.packed.strips)
        return cls(spec.shape, data, find_format(spec.packed.format), parts, strips)

    def empty(self, dtype: torch.dtype) -> torch.Tensor:
        """Room for it, expanded."""
        return torch.empty(self.shape, dtype=dtype, device=self.plain.device)

    def expand_into(self, target: torch.Tensor) -> None:
        """Write it to `target`, in the type and on the device of that."""
        if self.format is None:
            target.copy_(self.plain)
        elif self.strips:
            for strip, rows in zip(
                self.strips, torch.split(target, [each.shape[0] for each in self.strips]), strict=True
            ):
                strip.expand_into(rows)
        else:
            self.format.decode({suffix: part.to(target.device) for suffix, part in self.parts.items()}, target)

    def expand_entries(self, low: int, high: int, target: torch.Tensor) -> None:
        """Write entries `low` to `high` of the first dimension to the same entries of `target`, of the whole shape."""
        if self.format is None:
            target[low:high].copy_(self.plain[low:high])
        else:
            self.format.decode(self.format.slice_rows(self.parts, low, high), target[low:high])


class LayerBinding:
    """The places of one shard's tensors in one module; `bind` may be called with any buffer that holds the shard.

    Attributes:
        converted_bytes: size of the tensors in the compute dtype.
        needs_conversion: the compute dtype differs from the stored one for some tensor.
    """

    def __init__(self, module: nn.Module, tensors: tuple[TensorSpec, ...]) -> None:
        self._places = [_place(module, spec) for spec in tensors]
        self._converted = converted_layout(tensors, [place.dtype for place in self._places])
        self.converted_bytes = max((spec.offset + spec.nbytes for spec in self._converted), default=0)
        self.needs_conversion = any(
            place.spec.packed is not None or _torch_dtype(place.spec) != place.dtype for place in self._places
        )
        self._views: dict[tuple[str, int], list[_Stored]] = {}
        self._expanded: list[torch.Tensor] | None = None
        self._in_experts: frozenset[str] = frozenset()
        self._awaited: list[tuple[_Stored, torch.Tensor]] = []  # of the slot bound last, where experts go from and to

    def await_experts(self, tensors: Sequence[str]) -> None:
        """Where a slot came without experts, leave `tensors`, of which they are entries, to `expand_experts`."""
        self._in_experts = frozenset(tensors)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts in the compute dtype."""
        pairs = zip(self._places, self._converted, strict=True)
        return sum(spec.nbytes for place, spec in pairs if place.spec.name in self._in_experts)

    def use_buffer(self, buffer: torch.Tensor) -> None:
        """Convert what streams into `buffer` (uint8, at least `converted_bytes`), which other layers use, too."""
        self._expanded = [tensor_view(buffer, spec) for spec in self._converted]

    def bind(self, slot: BoundSlot) -> None:
        """Make the module compute with the bytes in `slot`."""
        views = self._views_of(slot)
        if self.expands(slot):
            tensors = self._expand(views, is_sparse=slot.is_sparse)
        else:
            tensors = [view.plain for view in views]
        for place, tensor in zip(self._places, tensors, strict=True):
            place.tensors[place.leaf] = tensor

    def expand_experts(self, experts: Sequence[int]) -> None:
        """Expand `experts`, ascending, which have come to the slot bound last; none where they compute as they lie."""
        for low, high in _runs(experts):
            for stored, target in self._awaited:
                stored.expand_entries(low, high, target)

    def expands(self, slot: BoundSlot) -> bool:
        """Whether what is in `slot` has to be brought to the compute dtype whenever it is computed with."""
        return self.needs_conversion and not slot.is_converted

    def expand(self, slot: BoundSlot) -> None:
        """Bring what is in `slot` to the compute dtype, as `bind` does, and leave it at that."""
        self._expand(self._views_of(slot), is_sparse=slot.is_sparse)

    def prepare(self, device: torch.device) -> None:
        """Have at hand what expanding packed tensors on `device` needs, before anything of it is recorded."""
        for place in self._places:
            if place.spec.packed is not None:
                find_format(place.spec.packed.format).prepare(device, place.dtype)

    def convert(self, stored: torch.Tensor, target: torch.Tensor) -> None:
        """Write the tensors in `stored` (uint8, one shard's bytes) to `target` (uint8) in the compute dtype."""
        for place, spec in zip(self._places, self._converted, strict=True):
            _Stored.of(stored, place.spec).expand_into(tensor_view(target, spec))

    def unbind(self) -> None:
        """Leave only meta tensors in the module, and forget all buffers."""
        self._views.clear()
        self._expanded = None
        self._awaited = []
        for place in self._places:
            place.tensors[place.leaf] = torch.empty(place.spec.shape, dtype=place.dtype, device="meta")

    def _views_of(self, slot: BoundSlot) -> list[_Stored]:
        views = self._views.get(slot.key)
        if views is None:
            specs = self._converted if slot.is_converted else [place.spec for place in self._places]
            views = self._views[slot.key] = [_Stored.of(slot.tensor, spec) for spec in specs]
        return views

    def _expand(self, views: list[_Stored], *, is_sparse: bool) -> list[torch.Tensor]:
        into = self._expanded
        if into is None:
            into = [view.empty(place.dtype) for place, view in zip(self._places, views, strict=True)]
        tensors, self._awaited = [], []
        for place, view, expanded in zip(self._places, views, into, strict=True):
            if view.format is None and view.plain.dtype == place.dtype:
                tensors.append(view.plain)
                continue
            if is_sparse and place.spec.name in self._in_experts:
                self._awaited.append((view, expanded))
            else:
                view.expand_into(expanded)
            tensors.append(expanded)
        return tensors


def converted_layout(tensors: tuple[TensorSpec, ...], dtypes: list[torch.dtype]) -> list[TensorSpec]:
    """The tensors one after the other in other dtypes, each on 64 bytes."""
    layout: list[TensorSpec] = []
    offset = 0
    for spec, dtype in zip(tensors, dtypes, strict=True):
        nbytes = math.prod(spec.shape) * dtype.itemsize
        layout.append(TensorSpec(spec.name, str(dtype).removeprefix("torch."), spec.shape, offset, nbytes))
        offset += -(-nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
    return layout


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and end of each run of neighbours among ascending `numbers`."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _torch_dtype(spec: TensorSpec) -> torch.dtype:
    return TORCH_DTYPES[spec.dtype]


def tensor_view(data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor that `spec` describes inside `data` (uint8, one shard's bytes)."""
    return data[spec.offset : spec.offset + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)


def _place(module: nn.Module, spec: TensorSpec) -> _Place:
    path, _, leaf = spec.name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(f"the model has no module {path!r} for the tensor {spec.name!r}") from error
    for tensors in (owner._parameters, owner._buffers):
        expected = tensors.get(leaf)
        if expected is not None:
            if tuple(expected.shape) != spec.shape:
                raise CheckpointError(
                    f"tensor {spec.name!r} has shape {list(spec.shape)}, the model expects {list(expected.shape)}"
                )
            dtype = expected.dtype if expected.is_floating_point() else TORCH_DTYPES[spec.dtype]
            return _Place(tensors, leaf, spec, dtype)
    raise CheckpointError(f"the model has no parameter or buffer {spec.name!r}")
