"""What a plan will cost: seconds a sweep and tokens a second, from bytes and bandwidths.

    seconds >= max(bytes from disk / disk, bytes to the device / bus, bytes of weights / memory, 2 P T / flops)

All lanes work at once, so the slowest one is the sweep. On a CPU nothing is copied, and reading weights from memory
and multiplying with them is one piece of work after the other: those two add up. Keys and values read by attention,
launch overhead and the waits of a real machine are not in it: it is the limit that a measurement is held against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lamella_engine.expert_share import is_sparse, visited_share
from lamella_engine.placement import Bandwidths, LayerPlacement, ModelSizes, Plan, Tier

MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class LaneSeconds:
    """Seconds of a sweep that each lane is busy: reading, copying to the device, weights from memory, arithmetic."""

    disk: float
    bus: float
    memory: float
    compute: float


@dataclass(frozen=True)
class Prediction:
    """What a decoding sweep of `num_sequences` sequences takes at best.

    Attributes:
        num_sequences: how many decode at once; what exceeds the plan's tokens a sweep waits for the next one.
        seconds: of one sweep.
        tokens_per_second: of all sequences together.
        lanes: how long each lane is busy.
        binding: the lane that limits: ``disk``, ``bus``, ``memory`` or ``compute``.
    """

    num_sequences: int
    seconds: float
    tokens_per_second: float
    lanes: LaneSeconds
    binding: str


def predict(sizes: ModelSizes, plan: Plan, bandwidths: Bandwidths, num_sequences: int) -> Prediction:
    """Predict a sweep in which each of `num_sequences` sequences gets one token."""
    tokens = min(num_sequences, plan.sweep_tokens)
    lanes = _lanes(sizes, plan, bandwidths, tokens)
    if plan.vram is None:
        works = {"disk": lanes.disk, "memory": lanes.memory + lanes.compute}
        binding = "compute" if lanes.compute > lanes.memory else "memory"
    else:
        # With one slot the bus waits while the piece in it is computed; with more it never does.
        bus = lanes.bus + (_streamed_share(plan) * max(lanes.memory, lanes.compute) if plan.device_slots == 1 else 0.0)
        works = {"disk": lanes.disk, "bus": bus, "memory": lanes.memory, "compute": lanes.compute}
        binding = max(works, key=lambda lane: works[lane])
    seconds = max(works.values())
    if seconds == works["disk"] and lanes.disk > 0:
        binding = "disk"
    return Prediction(num_sequences, seconds, tokens / seconds if seconds else math.inf, lanes, binding)


def free_tokens(sizes: ModelSizes, plan: Plan, bandwidths: Bandwidths) -> int:
    """How many tokens ride a sweep of `plan` for free: those computed in the time that moving its weights takes."""
    lanes = _lanes(sizes, plan, bandwidths, MAX_TOKENS)  # with so many, every expert is wanted
    return int(bandwidths.flops * max(lanes.disk, lanes.bus, lanes.memory) / (2 * sizes.active_parameters))


def root_expansion(sizes: ModelSizes) -> float:
    """Bytes in the compute dtype per stored byte outside the layers."""
    return sizes.expansion if sizes.root_expansion is None else sizes.root_expansion


def head_computed(sizes: ModelSizes) -> int:
    """Bytes of the head in the compute dtype."""
    return math.ceil(sizes.head_bytes * root_expansion(sizes)) if sizes.tables is None else sizes.tables.head


def other_computed(sizes: ModelSizes) -> int:
    """Bytes of what is neither layer nor table in the compute dtype."""
    return math.ceil(sizes.other * root_expansion(sizes)) if sizes.tables is None else sizes.tables.other


def _head_traffic(sizes: ModelSizes, plan: Plan) -> int:
    """As `computed_bytes`, of the head."""
    if not plan.head.num_blocks or (not sizes.is_head_packed and root_expansion(sizes) == 1):
        return plan.head.nbytes
    return plan.head.nbytes + 2 * head_computed(sizes)


def computed_bytes(sizes: ModelSizes, nbytes: int, *, is_streamed: bool) -> int:
    """Memory traffic of computing with `nbytes` bytes of weights where they lie.

    A streamed piece that is stored in another type is read, written in the compute type, and read again.
    """
    if not is_streamed or sizes.expansion == 1:
        return nbytes
    return nbytes + 2 * math.ceil(nbytes * sizes.expansion)


def moved_bytes(sizes: ModelSizes, place: LayerPlacement, tokens: int) -> int:
    """Bytes of a layer that streams that a sweep of `tokens` tokens moves: with few, only the experts they visit."""
    experts = sizes.experts
    if experts is None or not is_sparse(experts.count, experts.routed, tokens):
        return place.nbytes
    return place.nbytes - _unvisited(sizes, place, tokens)


def _unvisited(sizes: ModelSizes, place: LayerPlacement, tokens: int) -> int:
    """Bytes, as stored, of the experts of a layer that no token visits."""
    experts = sizes.experts
    if experts is None:
        return 0
    return int(experts.layers[place.layer] * (1.0 - visited_share(experts.count, experts.routed, tokens)))


def _read_bytes(sizes: ModelSizes, plan: Plan, place: LayerPlacement, tokens: int) -> int:
    """Memory traffic of computing with a layer: no unvisited expert is read, or expanded where few are visited."""
    home = Tier.RAM if plan.vram is None else Tier.VRAM
    is_expanded = plan.keeps_packed or place.tier is not home
    nbytes = computed_bytes(sizes, place.nbytes, is_streamed=is_expanded)
    unvisited = _unvisited(sizes, place, tokens)
    if is_expanded and sizes.experts is not None and is_sparse(sizes.experts.count, sizes.experts.routed, tokens):
        unvisited = computed_bytes(sizes, unvisited, is_streamed=True)
    else:
        unvisited = math.ceil(unvisited * sizes.expansion)
    return max(0, nbytes - unvisited)


def kept_experts(sizes: ModelSizes, plan: Plan, tokens: int) -> tuple[int, int]:
    """Bytes of visited experts that a sweep finds in RAM instead of on disk, and on the device instead of anywhere.

    As if every expert were as likely as any other: what is visited most often is kept, so there are more.
    """
    experts, room = sizes.experts, plan.experts
    if experts is None or not room.entry_bytes or not is_sparse(experts.count, experts.routed, tokens):
        return 0, 0
    share = visited_share(experts.count, experts.routed, tokens)
    home = Tier.RAM if plan.vram is None else Tier.VRAM
    streams = sum(experts.layers[place.layer] for place in plan.layers if place.tier is not home)
    on_disk = sum(experts.layers[place.layer] for place in plan.layers if place.tier is Tier.DISK)
    in_vram = min(1.0, room.vram_bytes / max(1, streams))
    in_ram = min(1.0 - in_vram, room.ram_bytes / max(1, on_disk))
    return int(on_disk * share * in_ram), int(streams * share * in_vram)


def _lanes(sizes: ModelSizes, plan: Plan, bandwidths: Bandwidths, tokens: int) -> LaneSeconds:
    on_disk, in_ram = (
        sum(moved_bytes(sizes, place, tokens) for place in plan.layers if place.tier is tier)
        + (plan.head.nbytes if plan.head.num_blocks and plan.head.tier is tier else 0)
        for tier in (Tier.DISK, Tier.RAM)
    )
    from_ram, from_vram = kept_experts(sizes, plan, tokens)
    moved = max(0, on_disk + in_ram - from_vram)
    on_disk = max(0, on_disk - from_ram - from_vram * on_disk // max(1, on_disk + in_ram))
    read = sum(_read_bytes(sizes, plan, place, tokens) for place in plan.layers)
    read += _head_traffic(sizes, plan) + other_computed(sizes)
    return LaneSeconds(
        disk=on_disk / bandwidths.disk,
        bus=0.0 if plan.vram is None else moved / bandwidths.h2d,
        memory=read / bandwidths.device_memory,
        compute=2 * sizes.active_parameters * tokens / bandwidths.flops,
    )


def _streamed_share(plan: Plan) -> float:
    """How much of the weights passes a slot."""
    streamed = plan.layer_bytes(Tier.RAM) + plan.layer_bytes(Tier.DISK)
    resident = plan.layer_bytes(Tier.VRAM) + (0 if plan.head.num_blocks else plan.head.nbytes)
    return streamed / max(1, streamed + resident)
