"""Packs the tensors of a shard on their way to its file, and finds them again in it.

Owns what a shard says of its packed tensors (in the file's own metadata, parts under the tensor's name and a suffix)
and which tensor is left as it is because packing would not make it smaller. Outside the layers a tensor is packed strip
by strip (`strips`), and a strip's number stands before the suffix. `quant_spec` says which format a tensor gets,
`formats` packs; `shard_builder` writes, `shard_check` reads, `binding` and `streamed_head` expand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

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
from lamella_engine.strips import Rows, strip_rows
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
        tied: other names of tensors, by the name they are stored under.
    """

    spec: QuantSpec
    layer: int | None
    device: torch.device
    inputs: Mapping[str, Feedback] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    def format_for(self, tensor: TensorShape) -> str:
        """The format of `tensor` (by its name in the shard), or `FULL`.

        Raises:
            OptionError: that format does not take it; or its names are given two.
        """
        chosen = self.spec.format_for(TensorName(tensor.name, tensor.shape, self.layer, self.tied.get(tensor.name)))
        if chosen == FULL:
            return FULL
        try:
            find_format(chosen).check(tensor.shape, getattr(torch, tensor.dtype))
        except OptionError as error:
            where = "" if self.layer is None else f" of layer {self.layer}"
            raise OptionError(f"quant: {tensor.name!r}{where}: {error}") from error
        return chosen

    def pieces(self, tensor: TensorShape) -> list[TensorShape]:
        """What `tensor` is packed as: itself, or outside the layers strips of it, named by their numbers."""
        if self.layer is not None:
            return [tensor]
        return [
            TensorShape(f"{tensor.name}.{number}", tensor.dtype, (rows.high - rows.low, *tensor.shape[1:]))
            for number, rows in enumerate(strip_rows(tensor.shape))
        ]

    def most(self, tensors: Iterable[TensorShape]) -> list[TensorShape]:
        """What is stored of `tensors`, no less than it will be."""
        stored: list[TensorShape] = []
        for tensor in tensors:
            chosen = self.format_for(tensor)
            pieces = [] if chosen == FULL else self.pieces(tensor)
            parts = [part for piece in pieces for part in _shapes(piece, chosen)]
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
    plain: list[Conversion] = []
    stored: dict[str, torch.Tensor] = {}
    described: dict[str, dict[str, object]] = {}
    for conversion in conversions:
        targets = [replace(target, name=rename(target.name)) for target in conversion.targets]
        if all(packing.format_for(target) == FULL for target in targets):
            plain.append(conversion)  # run when it is written, so that it is not held until then
            continue
        for native, value in conversion.run().items():
            packed = _pack(TensorShape(rename(native), _name(value.dtype), tuple(value.shape)), value, packing)
            stored |= packed.stored
            described |= packed.described
            advance(value.nbytes)
    shapes = tuple(TensorShape(name, _name(value.dtype), tuple(value.shape)) for name, value in stored.items())
    listed = [replace(target, name=rename(target.name)) for conversion in plain for target in conversion.targets]
    metadata = {METADATA_KEY: json.dumps(described)} if described else {}
    layout = lay_out((*listed, *shapes), metadata, keeps_order=packing.layer is None and bool(described))
    whole = Conversion(shapes, tuple(stored), lambda: dict(stored))
    names = {target.name: rename(target.name) for conversion in plain for target in conversion.targets}
    left = sum(map(size_of, listed))

    def written(nbytes: int) -> None:
        """Tell of what is plain, which comes first; of what is packed it has been told."""
        nonlocal left
        advance(min(nbytes, left))
        left -= min(nbytes, left)

    return write_shard(path, layout, [*plain, whole], lambda name: names.get(name, name), written)


def expanded(conversion: Conversion, packing: Packing) -> Conversion:
    """As `conversion`, of what its weights expand to once they are packed."""

    def run() -> dict[str, torch.Tensor]:
        return {native: _expanded(native, value, packing) for native, value in conversion.run().items()}

    return replace(conversion, run=run, is_copy=False)


def _expanded(name: str, value: torch.Tensor, packing: Packing) -> torch.Tensor:
    packed = _pack(TensorShape(name, _name(value.dtype), tuple(value.shape)), value, packing)
    return _put_together(packed.stored, packed.described)[name]


def read_unpacked(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a shard's file, packed ones expanded into the type they had.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    with safe_open(path, "pt") as file:
        described = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    whole = _put_together(stored, described)
    return {name: value for name, value in whole.items() if not name.startswith(PADDING_PREFIX)}


def _put_together(stored: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of `stored`, the packed ones expanded."""
    made = dict(stored)
    for name, values in described.items():
        whole = torch.empty(values["shape"], dtype=getattr(torch, values["dtype"]))
        for prefix, rows in _described_pieces(name, values):
            parts = {suffix: made.pop(f"{prefix}.{suffix}") for suffix in values["parts"]}
            find_format(values["format"]).decode(parts, whole[rows.low : rows.high] if rows else whole)
        made[name] = whole
    return made


def _described_pieces(name: str, values: Mapping[str, Any]) -> list[tuple[str, Rows | None]]:
    """What the parts of a packed tensor are named after, and which rows those are; None for all."""
    bounds = values.get("strips")
    if bounds is None:
        return [(name, None)]
    return [(f"{name}.{number}", Rows(low, high)) for number, (low, high) in enumerate(pairwise(map(int, bounds)))]


def tensors_of(header: SafetensorsHeader, plain: Mapping[str, TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors of a shard, its packed ones put together from the parts that `plain` lists.

    Raises:
        ShardError: what the file says of its packed tensors does not fit what is in it.
    """
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return tuple(plain.values())
    left = dict(plain)
    packed: list[TensorSpec] = []
    try:
        for name, values in json.loads(text).items():
            packed.append(_tensor(str(name), values, left))
    except (ValueError, KeyError, TypeError, AttributeError, OptionError) as error:
        raise ShardError(f"what it says of its packed tensors cannot be understood ({error})") from error
    return (*left.values(), *packed)


def _tensor(name: str, values: Mapping[str, Any], left: dict[str, TensorSpec]) -> TensorSpec:
    """The packed tensor that `values` describe, its parts taken from `left`."""
    shape = tuple(map(int, values["shape"]))
    pieces = [
        _piece(prefix, shape if rows is None else (rows.high - rows.low, *shape[1:]), values, left)
        for prefix, rows in _described_pieces(name, values)
    ]
    if "strips" not in values:
        return pieces[0]
    _check_strips(values["strips"], shape, pieces)
    nbytes = sum(piece.nbytes for piece in pieces)
    packed = PackedParts(str(values["format"]), (), tuple(pieces))
    return TensorSpec(name, str(values["dtype"]), shape, pieces[0].offset, nbytes, packed)


def _piece(name: str, shape: tuple[int, ...], values: Mapping[str, Any], left: dict[str, TensorSpec]) -> TensorSpec:
    parts = tuple(left.pop(f"{name}.{suffix}") for suffix in values["parts"])
    named = tuple(
        TensorSpec(suffix, part.dtype, part.shape, part.offset, part.nbytes)
        for suffix, part in zip(values["parts"], parts, strict=True)
    )
    _check(values["format"], shape, values["dtype"], named)
    offset, nbytes = min(part.offset for part in parts), sum(part.nbytes for part in parts)
    return TensorSpec(name, str(values["dtype"]), shape, offset, nbytes, PackedParts(str(values["format"]), named))


def _check_strips(bounds: Sequence[int], shape: tuple[int, ...], strips: Sequence[TensorSpec]) -> None:
    """Refuse strips that are not all rows in order, or do not lie one behind the other."""
    if bounds[0] != 0 or bounds[-1] != shape[0] or any(high <= low for low, high in pairwise(bounds)):
        raise ValueError(f"strips that end at rows {list(bounds)} are not the {shape[0]} of the tensor")
    if any(later.offset < strip.end for strip, later in pairwise(strips)):
        raise ValueError("strips that do not lie one behind the other")


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


class _Packed(NamedTuple):
    """What is stored of a tensor, by name, and what is said of it if that is packed."""

    stored: dict[str, torch.Tensor]
    described: dict[str, dict[str, object]]


def _pack(tensor: TensorShape, value: torch.Tensor, packing: Packing) -> _Packed:
    """`value` packed as it is to be, or as it is where that is no smaller."""
    chosen = packing.format_for(tensor)
    if chosen == FULL:
        return _Packed({tensor.name: value}, {})
    pieces = packing.pieces(tensor)
    stored: dict[str, torch.Tensor] = {}
    bounds = [0]
    suffixes: list[str] = []
    for piece in pieces:
        rows = value if packing.layer is not None else value[bounds[-1] : bounds[-1] + piece.shape[0]]
        parts = _encode(rows, chosen, packing, tensor.name)
        suffixes = list(parts)
        bounds.append(bounds[-1] + piece.shape[0])
        stored |= {f"{piece.name}.{suffix}": part for suffix, part in parts.items()}
    if packed_bytes(stored) >= value.nbytes:
        return _Packed({tensor.name: value}, {})
    said: dict[str, object] = {"format": chosen, "dtype": tensor.dtype, "shape": tensor.shape, "parts": suffixes}
    return _Packed(stored, {tensor.name: said | ({} if packing.layer is not None else {"strips": bounds})})


def _encode(value: torch.Tensor, chosen: str, packing: Packing, name: str) -> dict[str, torch.Tensor]:
    format, inputs = find_format(chosen), packing.inputs.get(name)
    if inputs is None or not isinstance(format, FourBit):
        parts = format.encode(value.to(packing.device))
    else:
        parts = encode_calibrated(format, value.to(packing.device), inputs)
    return {suffix: part.cpu() for suffix, part in parts.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shapes(tensor: TensorShape, format: str) -> list[TensorShape]:
    parts = find_format(format).packed_parts(tensor.shape, getattr(torch, tensor.dtype))
    return [
        TensorShape(f"{tensor.name}.{suffix}", str(part.dtype).removeprefix("torch."), part.shape)
        for suffix, part in parts.items()
    ]
