"""A plan as people read it: budgets, where each part lives, what a sweep will take and what limits it.

Only shows. `plan_cli` has it made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from lamella_engine.byte_size import byte_size
from lamella_engine.estimate import Prediction
from lamella_engine.placement import Bandwidths, ModelSizes, Plan, Spending, Tier
from lamella_engine.plan_target import Origin

_PLAIN_WIDTH = 120  # columns where nobody says how wide the output may be
_LANES = {"disk": "disk", "h2d": "bus (host to device)", "device_memory": "memory of the device", "flops": "arithmetic"}
_TIER_NAMES = {Tier.VRAM: "VRAM", Tier.RAM: "RAM", Tier.DISK: "disk"}


@dataclass(frozen=True)
class PlanReport:
    """What there is to tell.

    Attributes:
        sizes, found_in, dtype: the model, where it was found, and what it computes in.
        plan: where everything is.
        max_sequences: sequences that may share a sweep.
        bandwidths, origins: what the lanes carry, and where those figures come from.
        predictions: for some numbers of sequences.
        shard_bytes, disk_bytes: what the shards take, and what they may take.
        is_card_here: the plan's device was there to be measured.
    """

    sizes: ModelSizes
    found_in: str
    dtype: str
    plan: Plan
    max_sequences: int
    bandwidths: Bandwidths
    origins: Mapping[str, Origin]
    predictions: tuple[Prediction, ...]
    shard_bytes: int
    disk_bytes: int
    is_card_here: bool

    def as_json(self) -> dict[str, object]:
        """Plain values; sizes in bytes, bandwidths in bytes or operations a second."""
        lanes = {
            name: {"value": getattr(self.bandwidths, name), "origin": str(origin)}
            for name, origin in self.origins.items()
        }
        return {
            "model": self.sizes.name,
            "found_in": self.found_in,
            "dtype": self.dtype,
            "sizes": asdict(self.sizes),
            "plan": asdict(self.plan),
            "max_sequences": self.max_sequences,
            "bandwidths": lanes,
            "predictions": [asdict(prediction) for prediction in self.predictions],
            "disk_space": {"needed": self.shard_bytes, "budget": self.disk_bytes},
        }

    def print(self, *, each_layer: bool) -> None:
        """Print tables to standard output; `each_layer` gives every layer a row."""
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, _PLAIN_WIDTH)
        sizes, plan = self.sizes, self.plan
        console.print(
            f"{sizes.name} ({self.found_in}): {len(sizes.layers)} layers, {byte_size(self.shard_bytes)}, "
            f"computed on {plan.device} in {self.dtype}",
            markup=False,
        )
        console.print(_budgets(plan))
        console.print(_every_layer(plan) if each_layer else _by_tier(plan))
        console.print(_predictions(self.predictions, self.max_sequences))
        for line in self._notes():
            console.print(line, markup=False)

    def _notes(self) -> Iterable[str]:
        plan = self.plan
        room = f"{plan.kv_tokens:,} tokens of cache, {plan.sweep_tokens:,} tokens a sweep at most"
        if plan.device_slots:
            room += f", {plan.device_slots} slots of {byte_size(plan.slot_bytes)}"
        yield room
        for name, origin in self.origins.items():
            value = getattr(self.bandwidths, name)
            unit = f"{value / 1e12:.2f} TFLOPS" if name == "flops" else f"{value / 1e9:.1f} GB/s"
            yield f"{_LANES[name]}: {unit}, {origin}"
        if not self.is_card_here:
            yield "there is no such card here: what is assumed is for a small one behind PCIe 3.0 x16"
        yield f"on disk: {byte_size(self.shard_bytes)} of the {byte_size(self.disk_bytes)} there may be"
        if any(each.num_sequences > self.max_sequences for each in self.predictions):
            yield f"* more than the {self.max_sequences} sequences of this plan: see --max-sequences"


def _budgets(plan: Plan) -> Table:
    table = Table("budget", "for", "size", title="Budgets", title_justify="left")
    table.columns[2].justify = "right"
    for name, spending in (("VRAM", plan.vram), ("RAM", plan.ram)):
        if spending is not None:
            _add_spending(table, name, spending)
    return table


def _add_spending(table: Table, name: str, spending: Spending) -> None:
    for use in spending.uses:
        table.add_row(name, use.what, byte_size(use.nbytes))
    left = spending.budget - spending.used
    table.add_row(name, f"of {byte_size(spending.budget)}, not used", byte_size(left), end_section=True)


def _by_tier(plan: Plan) -> Table:
    table = Table("part", "lives in", "computed on", "size", "which", title="Placement", title_justify="left")
    table.columns[3].justify = "right"
    for tier in Tier:
        places = [place for place in plan.layers if place.tier is tier]
        if places:
            count = f"{len(places)} layer{'s' if len(places) > 1 else ''}"
            total = byte_size(sum(place.nbytes for place in places))
            which = ranges([place.layer for place in places])
            table.add_row(count, _TIER_NAMES[tier], places[0].compute, total, which)
    _add_tables(table, plan)
    return table


def _every_layer(plan: Plan) -> Table:
    table = Table("part", "lives in", "computed on", "size", "which", title="Placement", title_justify="left")
    table.columns[3].justify = "right"
    for place in plan.layers:
        table.add_row("layer", _TIER_NAMES[place.tier], place.compute, byte_size(place.nbytes), str(place.layer))
    _add_tables(table, plan)
    return table


def _add_tables(table: Table, plan: Plan) -> None:
    blocks = f"in {plan.head.num_blocks} blocks of rows" if plan.head.num_blocks else ""
    blocks = "packed, expanded in every sweep" if blocks and plan.head.tier is Tier.VRAM else blocks
    table.add_row("head", _TIER_NAMES[plan.head.tier], plan.device, byte_size(plan.head.nbytes), blocks)
    table.add_row("embedding table", _TIER_NAMES[plan.embedding], plan.device, "", "rows as they are needed")


def _predictions(predictions: Sequence[Prediction], max_sequences: int) -> Table:
    table = Table(
        "sequences", "s/sweep", "tokens/s", "limit", "disk s", "bus s", "memory s", "compute s",
        title="Predicted, at best", title_justify="left",
    )  # fmt: skip
    for column in table.columns:
        column.justify = "right"
    for each in predictions:
        lanes = each.lanes
        mark = "*" if each.num_sequences > max_sequences else ""
        figures = (lanes.disk, lanes.bus, lanes.memory, lanes.compute)
        table.add_row(
            f"{each.num_sequences}{mark}",
            _figure(each.seconds),
            _figure(each.tokens_per_second),
            each.binding,
            *map(_figure, figures),
        )
    return table


def ranges(numbers: Sequence[int]) -> str:
    """Ascending `numbers` in few words: ``0-3, 5, 7``, or ``0, 8, ... 72 (every 8th)`` for a steady step."""
    steps = {later - earlier for earlier, later in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and (step := steps.pop()) > 1:
        return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]} (every {step})"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _figure(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value == 0 or math.isinf(value):
        return "0" if value == 0 else "-"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"
