"""A plan in figures, for those who watch an engine from outside: worker pages, metrics.

Owns the counting only. `open_model` makes them once, `engine` hands them out with its facts.
"""

from __future__ import annotations

from lamella_engine.estimate import predict
from lamella_engine.placement import Bandwidths, ModelSizes, Plan, Tier
from lamella_engine.sequence_types import PlanFacts


def plan_facts(sizes: ModelSizes, plan: Plan, bandwidths: Bandwidths) -> PlanFacts:
    """Count what `plan` keeps where, and predict what a sweep of one token takes at best."""
    layers = {tier: sum(place.tier is tier for place in plan.layers) for tier in Tier}
    return PlanFacts(
        layers_in_vram=layers[Tier.VRAM],
        layers_in_ram=layers[Tier.RAM],
        layers_on_disk=layers[Tier.DISK],
        bytes_in_vram=plan.layer_bytes(Tier.VRAM),
        bytes_in_ram=plan.layer_bytes(Tier.RAM),
        bytes_on_disk=plan.layer_bytes(Tier.DISK),
        kv_tokens=plan.kv_tokens,
        kv_bytes=plan.kv_bytes,
        sweep_tokens=plan.sweep_tokens,
        vram_bytes=None if plan.vram is None else plan.vram.budget,
        ram_bytes=plan.ram.budget,
        limit_s=predict(sizes, plan, bandwidths, 1).seconds,
        is_limit_measured=bool(bandwidths.measured),
    )
