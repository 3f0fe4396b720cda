"""The machine that a plan is printed for: this one, or one of which only the budgets are known.

Owns what is measured, what was given and what has to be assumed. `plan_cli` asks, `planner` and `estimate` use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from lamella_engine.budget import parse_budget, parse_flops, parse_rate
from lamella_engine.calibration import (
    ASSUMED,
    measure_device_memory,
    measure_disk,
    measure_flops,
    measure_h2d,
)
from lamella_engine.device import available_host_bytes, free_memory_bytes, resolve_device, total_memory_bytes
from lamella_engine.errors import OptionError
from lamella_engine.placement import Bandwidths

_CPU = torch.device("cpu")


class Origin(StrEnum):
    """Where a figure comes from."""

    MEASURED = "measured here"
    GIVEN = "given"
    ASSUMED = "assumed"


@dataclass(frozen=True)
class TargetOptions:
    """What the user says of the machine; None where nothing is said. Rates are texts such as ``12GB/s``."""

    device: str
    vram: str | None
    ram: str
    disk: str | None
    h2d: str | None
    memory: str | None
    flops: str | None


@dataclass(frozen=True)
class Target:
    """A machine to plan for.

    Attributes:
        device: name for the plan.
        here: the torch device, or None if the plan is for a card that is not here.
        vram, ram: budgets in bytes; `vram` is None on a CPU.
    """

    device: str
    here: torch.device | None
    vram: int | None
    ram: int


def find_target(options: TargetOptions) -> Target:
    """The machine that `options` describe.

    Raises:
        DeviceError: the device is not here, and no `vram` says what it would have.
        OptionError: a budget that cannot be understood, or that does not go with the device.
    """
    ram = parse_budget(options.ram, total_memory_bytes(_CPU), available_host_bytes(), "--ram")
    is_card_here = torch.cuda.is_available()
    is_cpu = options.device.startswith("cpu") or (
        options.device == "auto" and options.vram is None and not is_card_here
    )
    if is_cpu:
        device = resolve_device("cpu" if options.device == "auto" else options.device)
        for name, value in (("--vram", options.vram), ("--h2d", options.h2d)):
            if value is not None:
                raise OptionError(f"{name} is {value!r}, but a CPU has no device memory; leave it or --device cpu out")
        return Target("cpu", device, None, ram)
    if is_card_here or options.vram is None:
        device = resolve_device(options.device)
        budget = options.vram or "auto"
        vram = parse_budget(budget, total_memory_bytes(device), free_memory_bytes(device), "--vram")
        return Target(str(device), device, vram, ram)
    return Target(_absent_card(options.device), None, _absolute(options.vram), ram)


def bandwidths_of(
    target: Target, options: TargetOptions, shards: list[Path], dtype: torch.dtype
) -> tuple[Bandwidths, Mapping[str, Origin]]:
    """What the machine's lanes carry, and where each figure comes from.

    What is given is not measured; `shards` are the files that the disk is measured with, if there are any.

    Raises:
        OptionError: a rate that cannot be understood.
        ShardError: a shard cannot be read.
    """
    here = target.here
    found: dict[str, tuple[float, Origin]] = {
        "disk": _rate(options.disk, "--disk", (lambda: measure_disk(shards).bandwidth) if shards else None, "disk"),
        "device_memory": _rate(
            options.memory, "--memory", None if here is None else lambda: measure_device_memory(here), "device_memory"
        ),
    }
    if target.vram is None:
        found["h2d"] = (math.inf, Origin.GIVEN)
    else:
        found["h2d"] = _rate(options.h2d, "--h2d", None if here is None else lambda: measure_h2d(here), "h2d")
    if options.flops is not None:
        found["flops"] = (parse_flops(options.flops, "--flops"), Origin.GIVEN)
    elif here is not None:
        found["flops"] = (measure_flops(here, dtype), Origin.MEASURED)
    else:
        found["flops"] = (ASSUMED.flops, Origin.ASSUMED)
    measured = frozenset(name for name, (_, origin) in found.items() if origin is Origin.MEASURED)
    values = {name: value for name, (value, _) in found.items()}
    origins = {name: origin for name, (_, origin) in found.items() if not math.isinf(values[name])}
    return Bandwidths(**values, measured=measured), origins


def _rate(given: str | None, option: str, measure: Callable[[], float] | None, name: str) -> tuple[float, Origin]:
    if given is not None:
        return parse_rate(given, option), Origin.GIVEN
    if measure is not None:
        return measure(), Origin.MEASURED
    assumed: float = getattr(ASSUMED, name)
    return assumed, Origin.ASSUMED


def _absent_card(name: str) -> str:
    kind, _, index = name.partition(":")
    if name != "auto" and (kind != "cuda" or (index and not index.isdigit())):
        resolve_device(name)  # says what is wrong with it
    return "cuda:0" if name == "auto" else name


def _absolute(vram: str) -> int:
    if vram.strip().lower() == "auto" or vram.strip().endswith("%"):
        raise OptionError(
            f"--vram is {vram!r}: there is no GPU here to take a share of. Give what the card has, such as --vram 4GiB."
        )
    return parse_budget(vram, 0, 0, "--vram")
