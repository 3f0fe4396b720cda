"""Turns a buffer of layer bytes into the parameters of a module, without copying.

A tensor of a shard becomes a view into the slot's buffer; binding is one assignment per tensor. Views are kept per
buffer, so a steady sweep allocates nothing. Only a compute dtype other than the stored one costs a conversion.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamella_engine.errors import CheckpointError
from lamella_engine.shard import Shard, TensorSpec
from lamella_engine.slots import BoundSlot

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


class LayerBinding:
    """The places of one shard's tensors in one module; `bind` may be called with any buffer that holds the shard."""

    def __init__(self, module: nn.Module, shard: Shard) -> None:
        self._places = [_place(module, spec) for spec in shard.tensors]
        self._views: dict[int, list[torch.Tensor]] = {}

    def bind(self, slot: BoundSlot) -> None:
        """Make the module compute with the bytes in `slot`."""
        views = self._views.get(slot.key)
        if views is None:
            views = self._views[slot.key] = [tensor_view(slot.tensor, place.spec) for place in self._places]
        for place, view in zip(self._places, views, strict=True):
            place.tensors[place.leaf] = view if view.dtype == place.dtype else view.to(place.dtype)

    def unbind(self) -> None:
        """Leave only meta tensors in the module, and forget all buffers."""
        self._views.clear()
        for place in self._places:
            place.tensors[place.leaf] = torch.empty(place.spec.shape, dtype=place.dtype, device="meta")


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
