"""What a build will write, known before anything is read: every shard, its file, and the most that it takes.

`convert` says which tensors a shard holds; they are copied, packed (`packed_shard`), or left where they lie
(`in_place`). `shard_builder` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from lamella_engine import in_place
from lamella_engine.convert import ModelPlan, ShardPlan
from lamella_engine.errors import OptionError
from lamella_engine.formats import CALIBRATED_FORMATS
from lamella_engine.in_place import PlacedLayer, find_layer
from lamella_engine.manifest import layer_file, original_file
from lamella_engine.packed_shard import Packing
from lamella_engine.quant_mix import SizeTarget
from lamella_engine.quant_spec import CALIBRATED, QuantSpec, TensorName
from lamella_engine.shard_writer import ShardLayout, lay_out, size_of
from lamella_engine.weight_source import SourceKind, WeightSource

CPU = torch.device("cpu")


@dataclass(frozen=True)
class BuildRequest:
    """What to build: the model's name, its checked source, and the dtype to store in (None: the source's own).

    `in_place` leaves layers where they lie in the source's files, where they lie there as they are needed. `quant` says
    which tensors are packed (None: none is), or how small they have to be; `quant_device` packs.
    """

    name: str
    source: WeightSource
    kind: SourceKind
    location: str
    revision: str | None
    dtype: str | None
    in_place: bool = False
    quant: QuantSpec | SizeTarget | None = None
    quant_device: torch.device = CPU

    def packing(self, layer: int | None, tied: Mapping[str, str] = MappingProxyType({})) -> Packing | None:
        """How the tensors of a layer are packed, or those outside the layers; None if they are not."""
        return Packing(self.quant, layer, self.quant_device, tied=tied) if isinstance(self.quant, QuantSpec) else None


@dataclass(frozen=True)
class PlannedShard:
    """One shard to write: its file name, what goes into it and where; or where the layer lies already.

    With a `packing` the layout is of the most that it can take.
    """

    file: str
    plan: ShardPlan
    layout: ShardLayout
    placed: PlacedLayer | None = None
    packing: Packing | None = None

    @property
    def data_bytes(self) -> int:
        """What progress counts: bytes before packing."""
        return 0 if self.placed else sum(map(size_of, self.plan.tensors))

    @property
    def file_bytes(self) -> int:
        """The file's size; with a `packing` the most it can be."""
        return len(self.placed.as_json()) if self.placed else self.layout.file_bytes

    @property
    def key(self) -> bytes:
        """Differs for another shard."""
        return self.placed.as_json() if self.placed else self.layout.header


def plan_layers(request: BuildRequest, plan: ModelPlan) -> tuple[list[PlannedShard], dict[str, Path]]:
    """The layers' shards, and the files that some of them stay in."""
    shards: list[PlannedShard] = []
    names: dict[Path, str] = {}
    for index, layer in enumerate(plan.layers):
        found = find_layer(layer, request.source.find) if request.in_place else None
        if found is None:
            shards.append(plan_shard(layer_file(index), layer, request.packing(index)))
            continue
        file, placed = found
        placed = replace(placed, file=names.setdefault(file, original_file(len(names))))
        shards.append(PlannedShard(layer_file(index, in_place.SUFFIX), layer, lay_out(layer.tensors), placed))
    return shards, {name: file for file, name in names.items()}


def plan_shard(file: str, plan: ShardPlan, packing: Packing | None) -> PlannedShard:
    """A shard that is written to `file`.

    Raises:
        OptionError: a format does not take a tensor that it is to pack.
    """
    if packing is None:
        return PlannedShard(file, plan, lay_out(plan.tensors))
    tensors = packing.most(plan.tensors)
    keeps_order = packing.layer is None and len(tensors) > len(plan.tensors)
    return PlannedShard(file, plan, lay_out(tensors, keeps_order=keeps_order), packing=packing)


def check_quant(quant: QuantSpec, plan: ModelPlan) -> None:
    """Refuse a specification that names what the model does not have, or calibrates no layer."""
    layers = ((index, tensor) for index, layer in enumerate(plan.layers) for tensor in layer.tensors)
    names = [TensorName(tensor.name, tensor.shape, index) for index, tensor in layers]
    root = [TensorName(tensor.name, tensor.shape, None, plan.tied.get(tensor.name)) for tensor in plan.root.tensors]
    quant.check_against([*root, *names])
    if quant.calibration is not None and not any(quant.is_calibrated(quant.format_for(name)) for name in names):
        raise OptionError(
            "quant: codes are calibrated for matrices inside the layers, and none of those is packed as "
            f"{' or '.join(CALIBRATED_FORMATS)}; leave {CALIBRATED!r} out"
        )
