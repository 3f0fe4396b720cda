"""Packs the tensors of a shard on their way to its file, and finds them again in it.

Owns what a shard says of its packed tensors (in the file's own metadata, parts under the tensor's name and a suffix)
and which tensor is left as it is because packing would not make it smaller. `quant_spec` says which format a tensor
gets, `formats` packs; `shard_builder` writes, `shard_check` reads, `binding` expands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from lamella_engine.errors import OptionError, ShardError
from lamella_engine.formats import FORMATS, find_format, packed_bytes
from lamella_engine.formats.calibrated_rounding import Feedback, encode_calibrated
from lamella_engine.formats.four_bit import FourBit
from lamella_engine.quant_spec import FULL, QuantSpec, TensorName
from lamella_engine.safetensors_header import SafetensorsHeader
from lamella_engine.shard import PackedParts, TensorSpec
from lamella_engine.shard_writer import PADDING_PREFIX, ShardRecord, lay_out, size_of, write_shard
from lamella_engine.weight_source import Conversion, TensorShape

METADATA_KEY = "lamella.packed"


@dataclass(frozen=True)
class Packing:
    """How the tensors of one shard are packed.

    Attributes:
        spec: which format each gets.
        layer: index of the layer; None for what lies outside the layers.
        device: where they are packed.
        inputs: what the layer is given, by tensor, where codes are chosen for that.
    """

    spec: QuantSpec
    layer: int | None
    device: torch.device
    inputs: Mapping[str, Feedback] = field(default_factory=dict)

    def format_for(self, tensor: TensorShape) -> str:
        """The format of `tensor` (by its name in the shard), or `FULL`.

        Raises:
            OptionError: that format does not take it; or it is asked for outside the layers, where nothing is packed.
        """
        chosen = self.spec.format_for(TensorName(tensor.name, tensor.shape, self.layer))
        if chosen == FULL:
            return FULL
        if self.layer is None:
            raise OptionError(
                f"quant: {tensor.name!r} lies outside the layers, where weights stay in full precision; leave "
                f"{chosen!r} for it out"
            )
        try:
            find_format(chosen).check(tensor.shape, getattr(torch, tensor.dtype))
        except OptionError as error:
            raise OptionError(f"quant: {tensor.name!r} of layer {self.layer}: {error}") from error
        return chosen

    def most(self, tensors: Iterable[TensorShape]) -> list[TensorShape]:
        """What is stored of `tensors`, no less than it will be."""
        stored: list[TensorShape] = []
        for tensor in tensors:
            chosen = self.format_for(tensor)
            parts = [] if chosen == FULL else _shapes(tensor, chosen)
            stored += parts if parts and sum(map(size_of, parts)) < size_of(tensor) else [tensor]
        return stored


def write_packed(
    path: Path,
    conversions: Iterable[Conversion],
    packing: Packing,
    rename: Callable[[str], str],
    advance: Callable[[int], None],
) -> ShardRecord:
    """Run `conversions`, pack their results and write `path`; one shard's packed tensors are in memory at once.

    Raises:
        As `shard_writer.write_shard`.
        CheckpointError: a weight holds numbers that its format cannot express.
    """
    stored: dict[str, torch.Tensor] = {}
    described: dict[str, dict[str, object]] = {}
    for conversion in conversions:
        for native, value in conversion.run().items():
            name = rename(native)
            shape = TensorShape(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
            chosen = packing.format_for(shape)
            parts = {} if chosen == FULL else _pack(value, chosen, packing, name)
            if parts and packed_bytes(parts) < value.nbytes:
                stored |= {f"{name}.{suffix}": part for suffix, part in parts.items()}
                described[name] = {"format": chosen, "dtype": shape.dtype, "shape": shape.shape, "parts": list(parts)}
            else:
                stored[name] = value
            advance(value.nbytes)
    shapes = tuple(
        TensorShape(name, str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in stored.items()
    )
    layout = lay_out(shapes, {METADATA_KEY: json.dumps(described)} if described else {})
    whole = Conversion(shapes, tuple(stored), lambda: dict(stored))
    return write_shard(path, layout, [whole], lambda name: name, lambda _: None)


def read_unpacked(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a shard's file, packed ones expanded into the type they had.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    with safe_open(path, "pt") as file:
        described = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    for name, values in described.items():
        parts = {suffix: stored.pop(f"{name}.{suffix}") for suffix in values["parts"]}
        whole = stored[name] = torch.empty(values["shape"], dtype=getattr(torch, values["dtype"]))
        find_format(values["format"]).decode(parts, whole)
    return {name: value for name, value in stored.items() if not name.startswith(PADDING_PREFIX)}


def tensors_of(header: SafetensorsHeader, plain: Mapping[str, TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors of a shard, its packed ones put together from the parts that `plain` lists.

    Raises:
        ShardError: what the file says of its packed tensors does not fit what is in it.
    """
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return tuple(plain.values())
    left = dict(plain)
    packed = []
    try:
        for name, values in json.loads(text).items():
            parts = tuple(left.pop(f"{name}.{suffix}") for suffix in values["parts"])
            named = tuple(
                TensorSpec(suffix, part.dtype, part.shape, part.offset, part.nbytes)
                for suffix, part in zip(values["parts"], parts, strict=True)
            )
            shape = tuple(map(int, values["shape"]))
            _check(values["format"], shape, values["dtype"], named)
            packed.append(
                TensorSpec(
                    str(name), str(values["dtype"]), shape, min(part.offset for part in parts),
                    sum(part.nbytes for part in parts), PackedParts(str(values["format"]), named),
                )
            )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, OptionError) as error:
        raise ShardError(f"what it says of its packed tensors cannot be understood ({error})") from error
    return (*left.values(), *packed)


def _check(format: str, shape: tuple[int, ...], dtype: str, parts: tuple[TensorSpec, ...]) -> None:
    """Compare what is stored with what the format makes of such a tensor."""
    wanted = find_format(format).packed_parts(shape, getattr(torch, dtype))
    for part in parts:
        expected = wanted[part.name]
        is_exact = part.shape == expected.shape if FORMATS[format].has_fixed_size else True
        if not is_exact or part.dtype != str(expected.dtype).removeprefix("torch.") or part.nbytes > expected.nbytes:
            raise ValueError(f"part {part.name!r} is {part.dtype} {list(part.shape)}")
    if len(parts) != len(wanted):
        raise ValueError(f"{len(parts)} parts of {len(wanted)}")


def _pack(value: torch.Tensor, chosen: str, packing: Packing, name: str) -> dict[str, torch.Tensor]:
    format, inputs = find_format(chosen), packing.inputs.get(name)
    if inputs is None or not isinstance(format, FourBit):
        parts = format.encode(value.to(packing.device))
    else:
        parts = encode_calibrated(format, value.to(packing.device), inputs)
    return {suffix: part.cpu() for suffix, part in parts.items()}


def _shapes(tensor: TensorShape, format: str) -> list[TensorShape]:
    parts = find_format(format).packed_parts(tensor.shape, getattr(torch, tensor.dtype))
    return [
        TensorShape(f"{tensor.name}.{suffix}", str(part.dtype).removeprefix("torch."), part.shape)
        for suffix, part in parts.items()
    ]
