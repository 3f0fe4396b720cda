"""Decides where every byte of a model lives and where it is computed, once, from sizes and budgets.

Pure: nothing is read, no device is asked. The order on the compute device is norms, head, keys and values, workspace,
slots, then layers; `reserve` settles what the first ones take, `spread` which layers stay. Of the few layouts that fit
(head resident or in blocks, one slot or more, nothing streaming) the one that `estimate` predicts to be fastest is
taken, so that more budget is never slower; what it leaves over, `spare_room` gives to keys, values and larger sweeps.
Neighbours: `model_sizes` before it, `weight_stream` and `sweep` after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from lamella_engine.byte_size import byte_size
from lamella_engine.errors import OptionError, PlanError
from lamella_engine.estimate import free_tokens, head_computed, other_computed, predict, root_expansion
from lamella_engine.expert_room import kept_back, with_expert_room
from lamella_engine.placement import (
    Bandwidths,
    HeadPlacement,
    LayerPlacement,
    ModelSizes,
    Plan,
    Spending,
    Tier,
    Use,
)
from lamella_engine.reserve import MAX_SWEEP_TOKENS, Reserve, Wishes, device_bytes, most_kv_tokens, reserve, smallest
from lamella_engine.spare_room import KEYS_AND_VALUES, WORKSPACE, with_spare_room
from lamella_engine.spread import Room, place_layers

MIB = 1024**2
MIN_RING_BYTES = 64 * MIB  # some blocks for every reading thread
RING_BYTES = 256 * MIB
_RING_SHARE = 2  # of a small budget the ring takes at most one half
_ALIGNMENT = 4096  # reads past the file cache fill whole pages
_HOST_SLOTS = (3, 2)  # whole pieces in the ring of a CPU: one computes, one is ready, one is being read
_DEVICE_SLOTS = (2, 1)  # one computes while the other is filled


@dataclass(frozen=True)
class PlanRequest:
    """What a plan has to keep within.

    Attributes:
        device: torch device that computes; ``cpu`` has no `vram`.
        vram: bytes of device memory, all of it counted; None on a CPU.
        ram: bytes of host memory: pinned memory on a GPU, everything on a CPU. 0 keeps no layer in RAM and takes what
            cannot be done without (with a GPU the ring), which the plan then shows as its budget.
        bandwidths: of the machine; they choose between layouts and set the tokens of a sweep.
        max_sequences: sequences that share a sweep at most.
        kv_tokens: tokens of key-value cache, kept to the letter; None derives them, fewer where memory is short.
        sweep_tokens: tokens of a sweep, kept to the letter; None means as many as ride for free.
        expert_share: part of the memory that layers could have which is for experts of layers that stream.
    """

    device: str
    vram: int | None
    ram: int
    bandwidths: Bandwidths
    max_sequences: int = 8
    kv_tokens: int | None = None
    sweep_tokens: int | None = None
    expert_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_sequences", "kv_tokens", "sweep_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}; it must be at least 1")
        if self.sweep_tokens is not None and self.sweep_tokens < self.max_sequences:
            raise OptionError(
                f"sweep_tokens ({self.sweep_tokens}) is below max_sequences ({self.max_sequences}): "
                "not every sequence could get a token in a sweep; raise sweep_tokens"
            )
        if (self.vram is None) != (self.device == "cpu"):
            raise OptionError(f"device {self.device} and a device budget of {self.vram} do not go together")


class _Head(Enum):
    """How the head is on the compute device: ready to compute with, packed, or passing by in blocks."""

    EXPANDED = auto()
    PACKED = auto()
    STREAMED = auto()


@dataclass(frozen=True)
class _Layout:
    """One way to use the compute device's memory beside what is reserved: `slots` 0 means that nothing streams."""

    head: _Head
    slots: int
    fixed: int  # bytes of norms, head, slots and the buffer for expanded pieces
    layer_limit: int | None  # layers get less than the head or the slot that this layout goes without
    keeps_packed: bool = False  # layers that stay do so packed


def make_plan(sizes: ModelSizes, request: PlanRequest) -> Plan:
    """Place the model within the budgets of `request`; none of them is exceeded by a byte.

    Raises:
        PlanError: it does not fit; says what is missing and what would fit.
    """
    if not sizes.layers:
        raise OptionError(f"{sizes.name} has no layers to place")
    wishes = Wishes(request.max_sequences, request.kv_tokens, request.sweep_tokens, request.vram is not None)
    budget = request.ram if request.vram is None else request.vram
    layouts = tuple(_layouts(sizes, request))
    base = min(layout.fixed + _least_layers(sizes, request, layout) for layout in layouts)
    settled = reserve(sizes, wishes, budget, base, MAX_SWEEP_TOKENS)
    if settled is None and request.vram is None and request.ram == 0:
        return make_plan(sizes, replace(request, ram=base + smallest(sizes, wishes)))
    if settled is None:
        raise _refusal(sizes, request, wishes, budget, base)
    plan, useful = _fastest(sizes, request, layouts, settled), MAX_SWEEP_TOKENS
    if request.sweep_tokens is None:
        useful = min(useful, free_tokens(sizes, plan, request.bandwidths))
        settled = reserve(sizes, wishes, budget, base, useful)
        assert settled is not None, "fewer tokens a sweep take no more memory"
        plan = _fastest(sizes, request, layouts, settled)
    return with_spare_room(sizes, wishes, plan, useful)


def _layouts(sizes: ModelSizes, request: PlanRequest) -> Iterator[_Layout]:
    """From the one that is best where it fits; the order decides between equals."""
    is_card = request.vram is not None
    cost = device_bytes if is_card else int
    other, expanded_head, packed_head = map(cost, (other_computed(sizes), head_computed(sizes), sizes.head_bytes))
    slot = _slot_bytes(sizes, request, sizes.layers)
    piece, strip = cost(_expanded_piece(sizes, slot)), cost(sizes.strip_computed)
    keeps_packed = is_card and sizes.is_packed
    yield _Layout(_Head.EXPANDED, 0, other + expanded_head, None)
    if keeps_packed:
        yield _Layout(_Head.EXPANDED, 0, other + expanded_head + piece, None, keeps_packed)
    heads = {_Head.EXPANDED: expanded_head}
    if is_card and sizes.is_head_packed:
        heads = {_Head.PACKED: packed_head}  # to bring more by the bus costs more than expanding it does
        for keeps in (False, True)[: 1 + keeps_packed]:
            yield _Layout(_Head.PACKED, 0, other + packed_head + max(strip, piece * keeps), None, keeps)
    resident = min(heads.values())
    counts = _DEVICE_SLOTS if is_card else _HOST_SLOTS
    for head, nbytes in (heads | ({_Head.STREAMED: 0} if is_card else {})).items():
        for count in counts:
            fixed = other + nbytes + count * cost(slot) + (piece if head is _Head.EXPANDED else max(piece, strip))
            limits = [resident - 1] if head is _Head.STREAMED else []
            limits += [] if count == counts[0] else [cost(slot) - 1]
            yield _Layout(head, count, fixed, min(limits, default=None), keeps_packed)


def _least_layers(sizes: ModelSizes, request: PlanRequest, layout: _Layout) -> int:
    """Bytes of layers that `layout` cannot do without."""
    return 0 if layout.slots else sum(_layer_costs(sizes, request, layout))


def _layer_costs(sizes: ModelSizes, request: PlanRequest, layout: _Layout) -> tuple[int, ...]:
    """What each layer takes of the compute device where it stays."""
    if layout.keeps_packed:
        return tuple(map(device_bytes, sizes.layers))
    computed = _computed(sizes)
    return computed if request.vram is None else tuple(map(device_bytes, computed))


def _slot_bytes(sizes: ModelSizes, request: PlanRequest, streamed: Sequence[int]) -> int:
    """Room for the largest piece: a layer, and on a GPU the least of the head that can pass: a row, or a packed strip.

    On a CPU, which computes from what is read, with the page that a layer in a file of the original's may begin within.
    """
    largest = max(streamed, default=0)
    if request.vram is None:
        return -(-largest // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT
    return max(largest, sizes.head_unit)


def _computed(sizes: ModelSizes) -> tuple[int, ...]:
    """Bytes of each layer in the compute dtype."""
    return sizes.computed or tuple(_expanded(sizes, nbytes) for nbytes in sizes.layers)


def _expanded_piece(sizes: ModelSizes, slot: int) -> int:
    """Room for one piece in the compute dtype, where that is another than the stored one; `slot` holds the largest."""
    if sizes.computed:
        is_head_alike = sizes.is_head_packed or root_expansion(sizes) == 1
        return max(*sizes.computed, 0 if is_head_alike else math.ceil(slot * root_expansion(sizes)))
    return 0 if sizes.expansion == 1 else _expanded(sizes, slot)


def _expanded(sizes: ModelSizes, nbytes: int) -> int:
    return math.ceil(nbytes * sizes.expansion)


def _fastest(sizes: ModelSizes, request: PlanRequest, layouts: tuple[_Layout, ...], settled: Reserve) -> Plan:
    place = _on_cpu if request.vram is None else _on_card
    plans = [plan for layout in layouts if (plan := place(sizes, request, layout, settled)) is not None]
    if not plans:
        raise PlanError(
            f"{sizes.name} does not fit {request.device} without reading from disk, and a ram budget of "
            f"{byte_size(request.ram)} is {byte_size(MIN_RING_BYTES - request.ram)} too small for the ring that reads "
            f'go to. Give at least {byte_size(MIN_RING_BYTES)} (--ram "{MIN_RING_BYTES // MIB}MiB"), or 0, which '
            "keeps nothing but the ring.",
            MIN_RING_BYTES - request.ram,
        )
    return min(plans, key=lambda plan: predict(sizes, plan, request.bandwidths, request.max_sequences).seconds)


def _on_card(sizes: ModelSizes, request: PlanRequest, layout: _Layout, settled: Reserve) -> Plan | None:
    """The plan of one layout on a GPU, or None if it does not fit."""
    assert request.vram is not None
    room = request.vram - settled.nbytes - layout.fixed
    room = room if layout.layer_limit is None else min(room, layout.layer_limit)
    costs = _layer_costs(sizes, request, layout)
    if room < (0 if layout.slots else sum(costs)):
        return None
    card = Room(Tier.VRAM, room - (kept_back(sizes, room, request.expert_share) if layout.slots else 0), costs)
    streamed_head = sizes.head_bytes if layout.head is _Head.STREAMED else 0
    ring, head_tier = 0, Tier.RAM if streamed_head else Tier.VRAM
    tiers = place_layers(sizes.layers, (card, Room(Tier.RAM, max(0, request.ram - streamed_head), sizes.layers)))
    if Tier.DISK in tiers or streamed_head > request.ram:
        ring = _ring_bytes(max(sizes.layers), request.ram)
        if request.ram and ring > request.ram:
            return None
        room = max(0, request.ram - ring)
        if streamed_head:
            head_tier = Tier.RAM if streamed_head <= room else Tier.DISK
        room -= streamed_head if head_tier is Tier.RAM else 0
        room -= kept_back(sizes, room, request.expert_share)
        tiers = place_layers(sizes.layers, (card, Room(Tier.RAM, room, sizes.layers)))
    streams = [size for size, tier in zip(sizes.layers, tiers, strict=True) if tier is not Tier.VRAM]
    slot = _slot_bytes(sizes, request, streams or sizes.layers) if streams or streamed_head else 0
    head = _streamed_head(sizes, head_tier, slot) if streamed_head else _resident_head(sizes, Tier.VRAM, layout.head)
    plan = Plan(
        device=request.device,
        layers=_placements(sizes, request.device, tiers, None if layout.keeps_packed else Tier.VRAM),
        head=head,
        embedding=Tier.DISK,
        device_slots=layout.slots if slot else 0,
        slot_bytes=slot,
        ring_bytes=ring,
        kv_tokens=settled.kv_tokens,
        kv_bytes=settled.kv_bytes,
        sweep_tokens=settled.sweep_tokens,
        workspace_bytes=settled.workspace_bytes,
        vram=None,
        ram=Spending(0, ()),
        keeps_packed=layout.keeps_packed,
    )
    plan = replace(plan, embedding=_table_tier(sizes, request, plan))
    plan = replace(plan, vram=_card_spending(sizes, request, plan), ram=_pinned_spending(sizes, request, plan))
    return with_expert_room(sizes, plan)


def _on_cpu(sizes: ModelSizes, request: PlanRequest, layout: _Layout, settled: Reserve) -> Plan | None:
    """The plan of one layout on a CPU, or None if it does not fit."""
    room = request.ram - settled.nbytes - layout.fixed
    room = room if layout.layer_limit is None else min(room, layout.layer_limit)
    costs = _computed(sizes)
    if room < (0 if layout.slots else sum(costs)):
        return None
    room -= kept_back(sizes, room, request.expert_share) if layout.slots else 0
    tiers = place_layers(sizes.layers, (Room(Tier.RAM, room, costs),))
    is_streaming = Tier.DISK in tiers
    slot = _slot_bytes(sizes, request, sizes.layers)
    plan = Plan(
        device=request.device,
        layers=_placements(sizes, request.device, tiers, Tier.RAM),
        head=_resident_head(sizes, Tier.RAM, layout.head),
        embedding=Tier.RAM if sizes.is_tied else Tier.DISK,
        device_slots=0,
        slot_bytes=slot if is_streaming else 0,
        ring_bytes=layout.slots * slot if is_streaming else 0,
        kv_tokens=settled.kv_tokens,
        kv_bytes=settled.kv_bytes,
        sweep_tokens=settled.sweep_tokens,
        workspace_bytes=settled.workspace_bytes,
        vram=None,
        ram=Spending(0, ()),
    )
    plan = with_expert_room(sizes, replace(plan, ram=Spending(request.ram, tuple(_host_uses(sizes, plan)))))
    if not sizes.is_tied and plan.ram.used + sizes.embedding <= request.ram:
        table = Use("embedding table", sizes.embedding)
        plan = replace(plan, embedding=Tier.RAM, ram=Spending(request.ram, (*plan.ram.uses, table)))
    return plan


def _placements(
    sizes: ModelSizes, device: str, tiers: tuple[Tier, ...], home: Tier | None
) -> tuple[LayerPlacement, ...]:
    """Layers at `home` have the size of the compute type, the others the size they are stored in."""
    return tuple(
        LayerPlacement(index, computed if tier is home else nbytes, tier, device)
        for index, (nbytes, computed, tier) in enumerate(zip(sizes.layers, _computed(sizes), tiers, strict=True))
    )


def _resident_head(sizes: ModelSizes, tier: Tier, head: _Head) -> HeadPlacement:
    """Ready to compute with, or one packed block."""
    if head is _Head.PACKED:
        return HeadPlacement(sizes.head_bytes, tier, 1)
    return HeadPlacement(head_computed(sizes), tier, 0)


def _streamed_head(sizes: ModelSizes, tier: Tier, slot_bytes: int) -> HeadPlacement:
    """Blocks of whole rows or strips, none larger than a slot."""
    return HeadPlacement(sizes.head_bytes, tier, -(-sizes.head_units // (slot_bytes // sizes.head_unit)))


def _table_tier(sizes: ModelSizes, request: PlanRequest, plan: Plan) -> Tier:
    """Where embedding rows are gathered from.

    A tied table is the head where that is on the device; one that streams in blocks is not kept whole as well.
    """
    if sizes.is_tied:
        return Tier.VRAM if plan.head.tier is Tier.VRAM else Tier.DISK
    taken = plan.ring_bytes + plan.layer_bytes(Tier.RAM)
    return Tier.RAM if taken + sizes.embedding <= request.ram else Tier.DISK


def _ring_bytes(largest: int, ram: int) -> int:
    """A layer ahead, or `RING_BYTES` if that is more; less in a small budget, and at most `RING_BYTES` in one of 0."""
    if ram == 0:
        return min(RING_BYTES, max(MIN_RING_BYTES, largest))
    return max(MIN_RING_BYTES, min(max(RING_BYTES, largest), ram // _RING_SHARE))


def _card_spending(sizes: ModelSizes, request: PlanRequest, plan: Plan) -> Spending:
    assert request.vram is not None
    resident = [place.nbytes for place in plan.layers if place.tier is Tier.VRAM]
    slot = device_bytes(plan.slot_bytes)
    piece = device_bytes(_expanded_piece(sizes, plan.slot_bytes)) if plan.keeps_packed or plan.slot_bytes else 0
    expanded = max(piece, device_bytes(sizes.strip_computed) if plan.head.num_blocks else 0)
    head = device_bytes(plan.head.nbytes) if plan.head.tier is Tier.VRAM else 0
    uses = (
        Use("norms and positions", device_bytes(other_computed(sizes))),
        Use("head and embedding table" if sizes.is_tied else "head", head),
        Use(KEYS_AND_VALUES, plan.kv_bytes),
        Use(WORKSPACE, plan.workspace_bytes),
        Use(f"slots ({plan.device_slots})", plan.device_slots * slot),
        Use("converted piece", expanded),
        Use(f"layers ({len(resident)})", sum(map(device_bytes, resident))),
    )
    return Spending(request.vram, _worth_telling(uses))


def _pinned_spending(sizes: ModelSizes, request: PlanRequest, plan: Plan) -> Spending:
    waiting = [place.nbytes for place in plan.layers if place.tier is Tier.RAM]
    head = plan.head.nbytes if plan.head.num_blocks and plan.head.tier is Tier.RAM else 0
    uses = (
        Use("ring", plan.ring_bytes),
        Use("head", head),
        Use(f"layers ({len(waiting)})", sum(waiting)),
        Use("embedding table", sizes.embedding if plan.embedding is Tier.RAM and not sizes.is_tied else 0),
    )
    return Spending(request.ram or plan.ring_bytes, _worth_telling(uses))


def _host_uses(sizes: ModelSizes, plan: Plan) -> tuple[Use, ...]:
    resident = [place.nbytes for place in plan.layers if place.tier is Tier.RAM]
    slots = plan.ring_bytes // plan.slot_bytes if plan.slot_bytes else 0
    return _worth_telling(
        (
            Use("norms and positions", other_computed(sizes)),
            Use("head and embedding table" if sizes.is_tied else "head", plan.head.nbytes),
            Use(KEYS_AND_VALUES, plan.kv_bytes),
            Use(WORKSPACE, plan.workspace_bytes),
            Use(f"ring ({slots} slots)", plan.ring_bytes),
            Use("converted piece", _expanded_piece(sizes, plan.slot_bytes) if plan.slot_bytes else 0),
            Use(f"layers ({len(resident)})", sum(resident)),
        )
    )


def _worth_telling(uses: tuple[Use, ...]) -> tuple[Use, ...]:
    return tuple(use for use in uses if use.nbytes)


def _refusal(sizes: ModelSizes, request: PlanRequest, wishes: Wishes, budget: int, base: int) -> PlanError:
    """Says what is missing, the smallest budget that works, and whether fewer tokens would do."""
    needed = base + smallest(sizes, wishes)
    option = "ram" if request.vram is None else "vram"
    what = "everything but the layers" if request.vram is None else "one layer at a time and what must stay"
    advice = f'Give at least {byte_size(needed)} (--{option} "{-(-needed // MIB)}MiB")'
    if wishes.kv_tokens is not None and (fits := most_kv_tokens(sizes, wishes, budget - base)):
        advice += f", or ask for fewer tokens of cache: --kv-tokens {fits} fits"
    elif wishes.sweep_tokens is not None and base + smallest(sizes, replace(wishes, sweep_tokens=None)) <= budget:
        advice += ", or leave --sweep-tokens out"
    return PlanError(
        f"{sizes.name} does not fit a {option} budget of {byte_size(budget)} on {request.device}: it needs "
        f"{byte_size(needed)} for {what}, so {byte_size(needed - budget)} ({needed - budget:,} bytes) are missing. "
        f"{advice}.",
        needed - budget,
    )
