"""A real model and real budgets, and the same plan carried over to a model small enough to be run anywhere.

Owns the shapes, the budgets and the way a plan goes from the real model to the scaled one. Every width of the scaled
model is a sixteenth of the real one's, so every piece has the same share of the bytes. The planner decides with the
real sizes and the nominal figures of the machine: its ring, its caches and its rounding do not shrink with a model.
Neighbours: `slow_machine` is what the carried plan runs on, `virtual` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.checkpoint import CONTEXT_TOKENS, LlamaShape
from benchmarks.slow_machine import GIB, OldMachine, slow_machine
from lamella_engine.file_reads import ReadStyle
from lamella_engine.open_model import Machine
from lamella_engine.options import EngineOptions
from lamella_engine.placement import Bandwidths, LayerPlacement, ModelSizes, Plan, Tier
from lamella_engine.planner import PlanRequest, make_plan

WIDTHS = 16  # the real widths over the scaled ones
SCALE = WIDTHS * WIDTHS * 2 // 4  # real bytes over scaled ones: two bytes a number against four
REAL_NAME = "a 7B model in half precision (32 layers, 14.5 GB, the shape of Mistral 7B)"
KV_TOKENS = 2048
MAX_SEQUENCES = 8
SWEEP_TOKENS = 64
_REAL_BLOCK = 16 * 2**20  # read at a time
_READ_DEPTH = 2  # at once; each is a thread of this machine


@dataclass(frozen=True)
class Budgets:
    """What a user might give the model: bytes of device memory (no more than the card has) and of host memory."""

    name: str
    vram: int
    ram: int


BUDGETS = (
    Budgets("disk", vram=2 * GIB, ram=0),
    Budgets("ram", vram=2 * GIB, ram=16 * GIB),
    Budgets("vram+ram+disk", vram=4 * GIB, ram=8 * GIB),
)


def real_shape(layers: int = 32) -> LlamaShape:
    """The model that is planned for."""
    return LlamaShape(layers, hidden=4096, ffn=14336, vocab=32000, heads=32, kv_heads=8, dtype="float16")


def scaled_shape(layers: int = 32) -> LlamaShape:
    """The model that is run: all widths divided by `WIDTHS`, in the type a CPU computes in."""
    real = real_shape(layers)
    hidden, ffn, vocab = (width // WIDTHS for width in (real.hidden, real.ffn, real.vocab))
    return LlamaShape(layers, hidden=hidden, ffn=ffn, vocab=vocab, heads=4, kv_heads=1, dtype="float32")


def real_sizes(shape: LlamaShape) -> ModelSizes:
    """`shape` in the figures that the planner asks for."""
    nbytes = {name: sum(math.prod(size) for _, size in tensors) * shape.itemsize for name, tensors in shape.modules()}
    kv_width = shape.hidden // shape.heads * shape.kv_heads
    return ModelSizes(
        name=REAL_NAME,
        layers=tuple(nbytes[f"layer {index}"] for index in range(shape.layers)),
        embedding=nbytes["embedding"],
        head=nbytes["head"],
        is_tied=False,
        other=nbytes["norm"],
        kv_bytes_per_token=2 * shape.layers * kv_width * shape.itemsize,
        expansion=1.0,
        active_parameters=(shape.nbytes - nbytes["embedding"]) // shape.itemsize,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        attention_width=shape.hidden,
        vocabulary=shape.vocab,
        itemsize=shape.itemsize,
        context_length=CONTEXT_TOKENS,
    )


def real_bandwidths(old: OldMachine) -> Bandwidths:
    """The nominal figures of `old`, for a plan."""
    return Bandwidths(old.disk, old.bus, old.memory, old.flops)


def real_plan(old: OldMachine, budgets: Budgets, sizes: ModelSizes) -> Plan:
    """What the planner makes of the real model on the real machine."""
    return make_plan(
        sizes,
        PlanRequest(
            device="virtual",
            vram=min(budgets.vram, old.vram),
            ram=budgets.ram,
            bandwidths=real_bandwidths(old),
            max_sequences=MAX_SEQUENCES,
            kv_tokens=KV_TOKENS,
            sweep_tokens=SWEEP_TOKENS,
        ),
    )


def scaled_plan(plan: Plan, sizes: ModelSizes) -> Plan:
    """`plan` for the scaled model of `sizes`: the same places for the same parts, every buffer `SCALE` times smaller.

    The spendings stay those of the real plan.
    """
    slot = max(sizes.layers) if plan.device_slots else 0
    layers = tuple(
        LayerPlacement(place.layer, nbytes, place.tier, place.compute)
        for place, nbytes in zip(plan.layers, sizes.layers, strict=True)
    )
    return replace(
        plan,
        layers=layers,
        head=replace(plan.head, nbytes=sizes.head_bytes),
        slot_bytes=slot,
        ring_bytes=plan.ring_bytes // SCALE,
        kv_bytes=KV_TOKENS * sizes.kv_bytes_per_token,
    )


def residents_first(plan: Plan) -> Plan:
    """The same budgets spent without spreading: first all layers of VRAM, then those of RAM, then those on disk."""
    order: Sequence[Tier] = (Tier.VRAM, Tier.RAM, Tier.DISK)
    tiers = sorted((place.tier for place in plan.layers), key=order.index)
    return replace(
        plan, layers=tuple(replace(place, tier=tier) for place, tier in zip(plan.layers, tiers, strict=True))
    )


def paced_machine(old: OldMachine, pace: float) -> Machine:
    """`old` for the scaled model, with all its lanes `pace` times as fast as they are."""
    style = ReadStyle(_READ_DEPTH, _REAL_BLOCK // SCALE, direct=False)
    return slow_machine(old, SCALE / pace, vram=old.vram // SCALE, ram=GIB, style=style)


def engine_options(store: Path, *, is_tracing: bool = False) -> EngineOptions:
    """Options of the engine that runs the scaled model."""
    return EngineOptions(
        store=store,
        device="cpu",
        trace=is_tracing,
        max_sequences=MAX_SEQUENCES,
        sweep_tokens=SWEEP_TOKENS,
        kv_tokens=KV_TOKENS,
        offline=True,
    )
