"""How much memory goes to experts that are kept between sweeps: pure arithmetic on a plan.

Whole layers have room first, unless a share is set aside; experts get what layers leave over. `planner` places the
layers, `expert_cache` uses what is decided here.
"""

from __future__ import annotations

from dataclasses import replace

from lamella_engine.placement import ExpertRoom, ModelSizes, Plan, Spending, Tier, Use
from lamella_engine.reserve import device_bytes

_USE = "experts that are visited most"


def kept_back(sizes: ModelSizes, room: int, share: float) -> int:
    """Bytes of the `room` that layers could have which are set aside for experts."""
    return int(max(0, room) * share) if sizes.experts is not None else 0


def with_expert_room(sizes: ModelSizes, plan: Plan) -> Plan:
    """`plan` with what its budgets have left given to experts of the layers that stream, in whole experts."""
    experts = sizes.experts
    if experts is None:
        return plan
    home = Tier.RAM if plan.vram is None else Tier.VRAM
    streams = [place.layer for place in plan.layers if place.tier is not home]
    entry = max((experts.layers[layer] // experts.count for layer in streams), default=0)
    if not entry:
        return plan
    in_vram = 0 if plan.vram is None else _whole(plan.vram, entry, experts.count * len(streams))
    on_disk = sum(place.tier is Tier.DISK for place in plan.layers)
    in_ram = _whole(plan.ram, entry, experts.count * on_disk)
    vram = plan.vram
    if vram is not None and in_vram:
        vram = replace(vram, uses=(*vram.uses, Use(_USE, device_bytes(in_vram))))
    ram = replace(plan.ram, uses=(*plan.ram.uses, Use(_USE, in_ram))) if in_ram else plan.ram
    return replace(plan, experts=ExpertRoom(entry, in_vram, in_ram), vram=vram, ram=ram)


def _whole(spending: Spending, entry: int, most: int) -> int:
    """Bytes of as many entries as the budget has left, at most `most`."""
    count = (spending.budget - spending.used) // entry
    while count > 0 and device_bytes(count * entry) > spending.budget - spending.used:
        count -= 1
    return max(0, min(count, most)) * entry
