"""Picks the mix of packed formats that keeps a model within so many bytes, with the least measured error.

Owns the target, the measurements (each packable tensor in each format, one layer in memory at a time, written down so
that a killed build goes on and another target measures nothing again) and the choice between them. The error of a
tensor is the power of what packing changes, relative to the tensor's own: what it adds to the noise of that product.
Neighbours: `quant_spec` says which tensors are packed, `formats` packs them, `shard_builder` builds the mix.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from lamella_engine.byte_size import byte_size
from lamella_engine.convert import ModelPlan, ShardPlan
from lamella_engine.errors import CheckpointError, OptionError
from lamella_engine.formats import FORMATS, Format, packing_error
from lamella_engine.progress import TRY_PACKING, Progress
from lamella_engine.quant_spec import FULL, QuantSpec, Rule, TensorName
from lamella_engine.shard_writer import lay_out, size_of

logger = logging.getLogger(__name__)

MEASURED_DIRECTORY = ".measured"  # in the store, one file for each source and type
_PER_PACKED_TENSOR = 1400  # bytes at most that a packed tensor takes in headers, and in padding between its parts
_DATA_ALIGNMENT = 4096
_PACKED_BY_DEFAULT = QuantSpec("int8")
_UNITS = (("gib", 2**30), ("mib", 2**20), ("kib", 2**10), ("b", 1))
_VARIANT = re.compile(r"mix-([0-9]+)(gib|mib|kib|b)")


@dataclass(frozen=True)
class SizeTarget:
    """All shards of a model are to take at most `nbytes` bytes."""

    nbytes: int

    def __str__(self) -> str:
        """What a model's name says of it, such as ``mix-4gib``."""
        unit, size = next((unit, size) for unit, size in _UNITS if self.nbytes % size == 0)
        return f"mix-{self.nbytes // size}{unit}"

    @classmethod
    def parse(cls, variant: str) -> SizeTarget | None:
        """The target that is written so; None if none is."""
        found = _VARIANT.fullmatch(variant)
        target = cls(int(found[1]) * dict(_UNITS)[found[2]]) if found else None
        return target if target is not None and str(target) == variant else None


@dataclass(frozen=True)
class Choice:
    """A tensor in one format: its bytes, and its relative squared error."""

    format: str
    nbytes: int
    error: float


@dataclass(frozen=True)
class Measured:
    """A tensor of a layer and what may become of it; one of the choices is full precision."""

    layer: int
    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Mix:
    """What was picked.

    Attributes:
        spec: the mix.
        nbytes: bytes that the shards take at most.
        error: relative error of a packed tensor, root mean square over all of them.
    """

    spec: QuantSpec
    nbytes: int
    error: float


def find_mix(
    plan: ModelPlan, fingerprint: str, target: SizeTarget, device: torch.device, store: Path, progress: Progress
) -> Mix:
    """Measure what has not been measured, and pick.

    Args:
        plan: the model's conversions.
        fingerprint: of what they read.
        target: what the shards may take.
        device: where tensors are packed to measure them.
        store: directory of the store, which keeps the measurements.
        progress: told of measuring.

    Raises:
        OptionError: no mix is as small as that, or none has to be made: the message says what would be possible.
    """
    fixed = sum(_fixed_bytes(shard, layer) for layer, shard in _shards(plan))
    _check_below_full(plan, target)
    measured = _measure(plan, fingerprint, device, store / MEASURED_DIRECTORY, progress)
    chosen = pick(measured, target.nbytes - fixed)
    if chosen is None:
        least = fixed + sum(min(choice.nbytes for choice in each.choices) for each in measured)
        raise OptionError(
            f"quant_target_bytes: {target.nbytes:,} bytes ({byte_size(target.nbytes)}) are too few: with every matrix "
            f"packed as small as it can be the model takes {least:,} bytes ({byte_size(least)}); give at least that"
        )
    spec = _spec(measured, chosen)
    packed = [choice.error for choice in chosen if choice.format != FULL]
    mix = Mix(spec, fixed + sum(choice.nbytes for choice in chosen), (sum(packed) / max(1, len(packed))) ** 0.5)
    counts = Counter(choice.format for choice in chosen)
    logger.info(
        "a mix of at most %s: %s; packing changes a matrix by %.2g of its size",
        byte_size(target.nbytes),
        ", ".join(f"{count} {format}" for format, count in counts.most_common()),
        mix.error,
    )
    return mix


def pick(measured: Sequence[Measured], room_bytes: int) -> tuple[Choice, ...] | None:
    """The choice for each tensor that together take at most `room_bytes` bytes, with little error; None if none do.

    Starts from the smallest choices and takes the steps to larger ones in the order of the error that a byte removes.
    Of the steps that one tensor offers only those count that no larger one beats, so the result is the best there is
    but for what the last bytes could still have bought.
    """
    ladders = [_ladder(each.choices) for each in measured]
    places = [0] * len(ladders)
    left = room_bytes - sum(ladder[0].nbytes for ladder in ladders)
    if left < 0:
        return None
    steps = [
        ((low.error - high.error) / (high.nbytes - low.nbytes), -index, place)
        for index, ladder in enumerate(ladders)
        for place, (low, high) in enumerate(pairwise(ladder))
    ]
    for _, negative, place in sorted(steps, key=lambda step: (-step[0], -step[1], step[2])):
        index = -negative
        cost = ladders[index][place + 1].nbytes - ladders[index][place].nbytes
        if places[index] == place and cost <= left:
            places[index] += 1
            left -= cost
    return tuple(ladder[place] for ladder, place in zip(ladders, places, strict=True))


def _ladder(choices: Iterable[Choice]) -> list[Choice]:
    """From the smallest choice upwards, each step removing less error a byte than the one before it."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.nbytes, choice.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(low: Choice, high: Choice) -> float:
    return (low.error - high.error) / (high.nbytes - low.nbytes)


def _shards(plan: ModelPlan) -> Iterator[tuple[int | None, ShardPlan]]:
    yield None, plan.root
    yield from enumerate(plan.layers)


def _is_packed(name: str, shape: tuple[int, ...], layer: int | None) -> bool:
    return layer is not None and _PACKED_BY_DEFAULT.format_for(TensorName(name, shape, layer)) != FULL


def _fixed_bytes(shard: ShardPlan, layer: int | None) -> int:
    """What a shard's file takes besides the tensors that there is a choice for, and no less."""
    free = [tensor for tensor in shard.tensors if _is_packed(tensor.name, tensor.shape, layer)]
    nbytes = lay_out(shard.tensors).file_bytes - sum(map(size_of, free)) + len(free) * _PER_PACKED_TENSOR
    return -(-nbytes // _DATA_ALIGNMENT) * _DATA_ALIGNMENT


def _check_below_full(plan: ModelPlan, target: SizeTarget) -> None:
    full = sum(lay_out(shard.tensors).file_bytes for _, shard in _shards(plan))
    if target.nbytes >= full:
        raise OptionError(
            f"quant_target_bytes: {target.nbytes:,} bytes ({byte_size(target.nbytes)}) are enough for the model as it "
            f"is, which takes {full:,} bytes ({byte_size(full)}); leave the target out"
        )


def _measure(
    plan: ModelPlan, fingerprint: str, device: torch.device, directory: Path, progress: Progress
) -> list[Measured]:
    dtypes = sorted({tensor.dtype for shard in plan.layers for tensor in shard.tensors})
    key = hashlib.sha256(f"{fingerprint} {dtypes} {sorted(FORMATS)}".encode()).hexdigest()[:16]
    records = directory / f"{key}.jsonl"
    known = {(each.layer, each.name): each for each in _read(records)}
    total = sum(size_of(tensor) for shard in plan.layers for tensor in shard.tensors)
    done = 0
    measured: list[Measured] = []
    for layer, shard in enumerate(plan.layers):
        names = [tensor.name for tensor in shard.tensors if _is_packed(tensor.name, tensor.shape, layer)]
        if any((layer, name) not in known for name in names):
            new = list(_measure_layer(layer, shard, set(names), device))
            _append(records, new)
            known |= {(each.layer, each.name): each for each in new}
        measured += [known[layer, name] for name in names]
        done += sum(map(size_of, shard.tensors))
        progress(TRY_PACKING, done, total)
    return measured


def _measure_layer(layer: int, shard: ShardPlan, names: set[str], device: torch.device) -> Iterator[Measured]:
    for conversion in shard.conversions:
        wanted = {target.name for target in conversion.targets if target.name.removeprefix(shard.prefix) in names}
        if not wanted:
            continue
        for native, value in conversion.run().items():
            if native in wanted:
                tensor = value.to(device)
                tried = (_try(name, format, tensor) for name, format in FORMATS.items())
                choices = [choice for choice in tried if choice is not None and choice.nbytes < value.nbytes]
                full = Choice(FULL, value.nbytes, 0.0)
                yield Measured(layer, native.removeprefix(shard.prefix), (*choices, full))


def _try(name: str, format: Format, tensor: torch.Tensor) -> Choice | None:
    """None if the format does not take the tensor, or not what is in it."""
    try:
        error = packing_error(format, tensor)
    except (OptionError, CheckpointError):
        return None
    return Choice(name, error.packed_bytes, error.relative**2)


def _read(records: Path) -> list[Measured]:
    found = []
    for line in records.read_text(encoding="utf-8", errors="replace").splitlines() if records.is_file() else []:
        try:
            values = json.loads(line)
            choices = tuple(Choice(str(c["format"]), int(c["nbytes"]), float(c["error"])) for c in values["choices"])
            found.append(Measured(int(values["layer"]), str(values["name"]), choices))
        except (ValueError, KeyError, TypeError):
            continue  # the line that was being written when the build was killed
    return found


def _append(records: Path, measured: Iterable[Measured]) -> None:
    records.parent.mkdir(parents=True, exist_ok=True)
    with records.open("a", encoding="utf-8") as file:
        file.write("".join(f"\n{json.dumps(asdict(each))}" for each in measured) + "\n")


def _spec(measured: Sequence[Measured], chosen: Sequence[Choice]) -> QuantSpec:
    """The choices in few words: the commonest format for all, and ranges of layers for the rest."""
    default = Counter(choice.format for choice in chosen).most_common(1)[0][0]
    by_name: dict[str, list[tuple[int, str]]] = {}
    for each, choice in zip(measured, chosen, strict=True):
        by_name.setdefault(each.name, []).append((each.layer, choice.format))
    rules = [
        Rule(f"layers.{first}.{name}" if first == last else f"layers.{first}-{last}.{name}", format)
        for name, formats in by_name.items()
        for first, last, format in _runs(sorted(formats))
        if format != default
    ]
    return QuantSpec(default, tuple(rules))


def _runs(formats: Sequence[tuple[int, str]]) -> Iterator[tuple[int, int, str]]:
    """Neighbouring layers of one format."""
    first, last, format = formats[0][0], formats[0][0], formats[0][1]
    for layer, each in formats[1:]:
        if each == format and layer == last + 1:
            last = layer
            continue
        yield first, last, format
        first, last, format = layer, layer, each
    yield first, last, format
