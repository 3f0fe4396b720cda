"""What a quantised checkpoint expands to: names, shapes and types first, values only when they are asked for.

Owns the frame that every format fills, and the rule that nothing packed is left over. A format looks at headers and at
its few small tables; weights are read when `ExpandedTensor.run` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from lamella_engine.dequantise.settings import Settings
from lamella_engine.errors import CheckpointError
from lamella_engine.safetensors_header import TensorEntry

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
# Scales of activations and of cached keys and values: what they would round is computed in full here.
_OF_ACTIVATIONS = frozenset(
    {
        "activation_scale", "input_scale", "input_global_scale", "input_zero_point", "output_scale",
        "output_zero_point", "q_scale", "k_scale", "v_scale", "kv_scale", "qscale_act",
    }
)  # fmt: skip


@dataclass(frozen=True)
class PackedWeights:
    """What a format works from.

    Attributes:
        settings: the quantisation settings of the config.
        tensors: every tensor of the files, by name.
        read: reads one of them.
        dtype: what to expand to.
    """

    settings: Settings
    tensors: Mapping[str, TensorEntry]
    read: Callable[[str], torch.Tensor]
    dtype: torch.dtype

    def entry(self, name: str, wanted_by: str) -> TensorEntry:
        """The tensor `name`, without which `wanted_by` means nothing.

        Raises:
            CheckpointError: it is missing.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{wanted_by!r} is quantised but the checkpoint lacks {name!r}, which belongs to it; fetch it again"
            )
        return self.tensors[name]


@dataclass(frozen=True)
class ExpandedTensor:
    """One tensor of the unquantised checkpoint: its name, its shape, what it is made of, and how."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    run: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Expansion:
    """A quantised checkpoint as an unquantised one.

    Attributes:
        description: the format, for people, such as ``fp8 in blocks of 128x128``.
        dtype: what packed tensors expand to.
        expanded: the tensors that were packed, by their unquantised names.
        kept: names of tensors that are stored as they are.
    """

    description: str
    dtype: torch.dtype
    expanded: Mapping[str, ExpandedTensor]
    kept: tuple[str, ...]


def expansion(packed: PackedWeights, description: str, tensors: Iterable[ExpandedTensor]) -> Expansion:
    """Put the tensors that a format expands beside those that it leaves alone.

    Raises:
        CheckpointError: two tensors claim one name, or something packed belongs to no expanded tensor.
    """
    expanded: dict[str, ExpandedTensor] = {}
    used: set[str] = set()
    for tensor in tensors:
        if tensor.name in expanded or (tensor.name in packed.tensors and tensor.name not in tensor.sources):
            raise CheckpointError(f"the checkpoint holds {tensor.name!r} twice, packed and plain; fetch it again")
        expanded[tensor.name] = tensor
        used.update(tensor.sources)
    kept = tuple(name for name in packed.tensors if name not in used and not _is_of_activations(name, packed))
    for name in kept:
        _check_plain(packed.tensors[name])
    return Expansion(description, packed.dtype, expanded, kept)


def _is_of_activations(name: str, packed: PackedWeights) -> bool:
    return name.rpartition(".")[2] in _OF_ACTIVATIONS and packed.tensors[name].dtype != "int32"


def _check_plain(entry: TensorEntry) -> None:
    leaf = entry.name.rpartition(".")[2]
    is_packed = entry.dtype.startswith("float8") or (leaf in _WEIGHTS and entry.dtype not in _FLOATS)
    if is_packed or leaf in _PARTS:
        raise CheckpointError(
            f"{entry.name!r} ({entry.dtype}) belongs to no weight that could be expanded: what goes with it is missing "
            "or its settings are those of another format; fetch the checkpoint again"
        )


_WEIGHTS = frozenset({"weight", "bias", "gate_up_proj", "down_proj"})
_PARTS = frozenset(
    {
        "qweight", "qzeros", "g_idx", "weight_packed", "weight_shape", "weight_scale", "weight_scale_inv",
        "weight_zero_point", "weight_g_idx", "weight_global_scale", "gate_up_proj_blocks", "gate_up_proj_scales",
        "down_proj_blocks", "down_proj_scales", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB",
    }
)  # fmt: skip
