"""Budgets that several models share: within the total, to whom they help most, or a refusal that names everyone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lamella_engine.errors import PlanError
from lamella_engine.estimate import predict
from lamella_engine.placement import ModelSizes, Plan, Tier
from lamella_engine.planner import PlanRequest, make_plan
from lamella_engine.shared_budget import Claim, share_budgets
from tests.engine.model_shapes import CARD, CPU, GIB, LLAMA_7B, LLAMA_70B, MIB, random_sizes

SMALL = replace(LLAMA_7B, name="small", layers=LLAMA_7B.layers[:4])


def card(vram: int, ram: int) -> PlanRequest:
    return PlanRequest("cuda:0", vram, ram, CARD)


def share(request: PlanRequest, *models: ModelSizes) -> list[Plan]:
    return share_budgets([Claim(sizes, request) for sizes in models])


def seconds(request: PlanRequest, sizes: ModelSizes, plan: Plan) -> float:
    return predict(sizes, plan, request.bandwidths, request.max_sequences).seconds


def used_vram(plans: list[Plan]) -> int:
    return sum(plan.vram.used for plan in plans if plan.vram is not None)


def test_one_model_gets_the_plan_that_it_has_alone() -> None:
    request = card(6 * GIB, 8 * GIB)

    assert share(request, LLAMA_7B) == [make_plan(LLAMA_7B, request)]


def test_what_models_use_together_keeps_within_both_budgets() -> None:
    request = card(8 * GIB, 12 * GIB)

    plans = share(request, LLAMA_7B, SMALL, LLAMA_70B)

    assert sum(plan.vram.budget for plan in plans if plan.vram is not None) <= 8 * GIB
    assert used_vram(plans) <= 8 * GIB
    assert sum(plan.ram.budget for plan in plans) <= 12 * GIB


def test_models_that_all_fit_the_device_stay_there() -> None:
    plans = share(card(24 * GIB, 16 * GIB), LLAMA_7B, SMALL)

    assert [plan.layer_bytes(Tier.RAM) + plan.layer_bytes(Tier.DISK) for plan in plans] == [0, 0]


def test_what_a_small_model_cannot_use_goes_to_the_large_one() -> None:
    request = card(8 * GIB, 32 * GIB)
    half = card(4 * GIB, 16 * GIB)

    large, small = share(request, LLAMA_7B, SMALL)

    assert seconds(request, LLAMA_7B, large) < 0.8 * seconds(request, LLAMA_7B, make_plan(LLAMA_7B, half))
    assert seconds(request, SMALL, small) <= 1.1 * seconds(request, SMALL, make_plan(SMALL, half))


def test_equal_models_get_nearly_equal_parts() -> None:
    plans = share(card(8 * GIB, 32 * GIB), LLAMA_7B, replace(LLAMA_7B, name="twin"))

    first, second = (plan.layer_bytes(Tier.VRAM) for plan in plans)
    assert abs(first - second) <= 2 * max(LLAMA_7B.layers)


def test_a_cpu_divides_its_memory() -> None:
    request = PlanRequest("cpu", None, 12 * GIB, CPU)

    plans = share(request, LLAMA_7B, SMALL)

    assert sum(plan.ram.budget for plan in plans) <= 12 * GIB
    assert plans[1].layer_bytes(Tier.DISK) == 0


def test_a_ram_budget_of_0_gives_each_what_it_cannot_do_without() -> None:
    request = PlanRequest("cpu", None, 0, CPU)

    plans = share(request, LLAMA_7B, SMALL)

    assert [plan.layer_bytes(Tier.RAM) for plan in plans] == [0, 0]


def test_models_that_do_not_fit_together_are_refused_with_the_bytes_of_each() -> None:
    request = card(1300 * MIB, 8 * GIB)
    assert all(make_plan(sizes, request) for sizes in (LLAMA_7B, SMALL))

    with pytest.raises(
        PlanError, match=r"2 models do not fit a vram budget .* at least llama .*, small .*missing"
    ) as caught:
        share(request, LLAMA_7B, SMALL)

    enough = card(1300 * MIB + caught.value.missing_bytes, 8 * GIB)
    assert used_vram(share(enough, LLAMA_7B, SMALL)) <= (enough.vram or 0)


def test_whatever_fits_at_all_is_within_the_budgets_and_planned_as_told() -> None:
    numbers = random.Random(3)
    planned = 0
    for _ in range(12):
        models = [random_sizes(numbers) for _ in range(numbers.randint(2, 3))]
        request = card(numbers.randint(64 * MIB, 6 * GIB), numbers.choice((0, numbers.randint(64 * MIB, 6 * GIB))))
        try:
            plans = share(request, *models)
        except PlanError:
            continue
        planned += 1
        assert used_vram(plans) <= (request.vram or 0)
        assert not request.ram or sum(plan.ram.used for plan in plans) <= request.ram
    assert planned >= 3
