"""Predictions: the slowest lane is the sweep, and the figures of a machine that was measured come out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lamella_engine.estimate import free_tokens, predict
from lamella_engine.placement import Bandwidths, Tier
from lamella_engine.planner import PlanRequest, make_plan
from tests.engine.model_shapes import CARD, CPU, GIB, LLAMA_7B, LLAMA_70B

FAST_BUS = Bandwidths(disk=1.7e9, h2d=54.7e9, device_memory=3e12, flops=6e14)


def test_a_capped_fast_card_is_limited_by_its_bus() -> None:
    plan = make_plan(LLAMA_7B, PlanRequest("cuda:0", 4 * GIB, 16 * GIB, FAST_BUS))

    predicted = predict(LLAMA_7B, plan, FAST_BUS, 1)

    streamed = plan.layer_bytes(Tier.RAM)
    assert predicted.binding == "bus"
    assert predicted.seconds == pytest.approx(streamed / 54.7e9)
    assert 0.07 < predicted.seconds < 0.11


def test_without_ram_the_disk_limits() -> None:
    plan = make_plan(LLAMA_7B, PlanRequest("cuda:0", 4 * GIB, 0, FAST_BUS))

    predicted = predict(LLAMA_7B, plan, FAST_BUS, 1)

    assert predicted.binding == "disk"
    assert predicted.seconds == pytest.approx(plan.layer_bytes(Tier.DISK) / 1.7e9)


def test_sequences_share_a_sweep_until_arithmetic_limits() -> None:
    plan = make_plan(LLAMA_7B, PlanRequest("cuda:0", 24 * GIB, 0, CARD, max_sequences=256))

    one, eight, many = (predict(LLAMA_7B, plan, CARD, count) for count in (1, 8, 256))

    assert one.binding == "memory"
    assert eight.tokens_per_second == pytest.approx(8 * one.tokens_per_second)
    assert many.binding == "compute"
    assert many.seconds == pytest.approx(2 * LLAMA_7B.active_parameters * 256 / CARD.flops)


def test_more_sequences_than_a_sweep_carries_wait_for_the_next() -> None:
    plan = make_plan(LLAMA_7B, PlanRequest("cuda:0", 24 * GIB, 0, CARD, max_sequences=8, sweep_tokens=16))

    carried, more = predict(LLAMA_7B, plan, CARD, 16), predict(LLAMA_7B, plan, CARD, 64)

    assert more.tokens_per_second == carried.tokens_per_second


def test_one_slot_makes_copying_and_computing_take_turns() -> None:
    plan = make_plan(LLAMA_70B, PlanRequest("cuda:0", 4 * GIB, 300 * GIB, CARD))
    assert plan.device_slots == 1

    alone = predict(LLAMA_70B, plan, CARD, 1)
    together = predict(LLAMA_70B, replace(plan, device_slots=2), CARD, 1)

    assert alone.binding == together.binding == "bus"
    assert together.seconds == together.lanes.bus
    assert together.seconds < alone.seconds <= together.lanes.bus + together.lanes.memory


def test_on_a_cpu_memory_and_arithmetic_add_up_and_nothing_is_copied() -> None:
    plan = make_plan(LLAMA_7B, PlanRequest("cpu", None, 32 * GIB, CPU))

    predicted = predict(LLAMA_7B, plan, CPU, 1)

    assert predicted.lanes.bus == predicted.lanes.disk == 0
    assert predicted.seconds == pytest.approx(predicted.lanes.memory + predicted.lanes.compute)
    assert predicted.binding == "memory"


def test_converting_streamed_weights_costs_memory_traffic() -> None:
    sizes = replace(LLAMA_7B, expansion=2.0)
    plan = make_plan(sizes, PlanRequest("cuda:0", 4 * GIB, 16 * GIB, CARD))

    predicted = predict(sizes, plan, CARD, 1)

    streamed = sum(place.nbytes for place in plan.layers if place.tier is not Tier.VRAM)
    assert predicted.lanes.memory * CARD.device_memory >= 5 * streamed


def test_free_tokens_take_as_long_as_moving_the_weights() -> None:
    plan = make_plan(LLAMA_7B, PlanRequest("cuda:0", 4 * GIB, 16 * GIB, CARD))
    tokens = free_tokens(LLAMA_7B, plan, CARD)

    lanes = predict(LLAMA_7B, replace(plan, sweep_tokens=tokens), CARD, tokens).lanes

    assert lanes.compute == pytest.approx(lanes.bus, rel=0.01)
