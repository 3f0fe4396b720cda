"""The plan: within every budget, every layer once, spread evenly, and never slower with more."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from lamella_engine.errors import OptionError, PlanError
from lamella_engine.estimate import predict
from lamella_engine.placement import ModelSizes, Plan, Tier
from lamella_engine.planner import MIN_RING_BYTES, RING_BYTES, PlanRequest, make_plan
from lamella_engine.reserve import MAX_SWEEP_TOKENS, MIN_SWEEP_TOKENS
from lamella_engine.spread import evenly
from lamella_engine.workspace import workspace_bytes
from tests.engine.model_shapes import CARD, CPU, GIB, LLAMA_7B, LLAMA_70B, MIB, random_sizes

TRIALS = 150


def card(vram: int, ram: int, **more: int) -> PlanRequest:
    return PlanRequest("cuda:0", vram, ram, CARD, **more)


def host(ram: int, **more: int) -> PlanRequest:
    return PlanRequest("cpu", None, ram, CPU, **more)


def seconds(sizes: ModelSizes, plan: Plan, request: PlanRequest) -> float:
    return predict(sizes, plan, request.bandwidths, request.max_sequences).seconds


def plan_or_none(sizes: ModelSizes, request: PlanRequest) -> Plan | None:
    try:
        return make_plan(sizes, request)
    except PlanError:
        return None


def needed(sizes: ModelSizes, request: PlanRequest) -> int:
    """The smallest budget of the compute device, by the refusal of one that cannot do."""
    with pytest.raises(PlanError) as caught:
        make_plan(sizes, replace(request, vram=1) if request.vram is not None else replace(request, ram=1))
    return 1 + caught.value.missing_bytes


def random_request(numbers: random.Random) -> PlanRequest:
    budget = numbers.choice((numbers.randint(16 * MIB, GIB), numbers.randint(16 * MIB, 12 * GIB)))
    sequences = numbers.choice((1, 8, 64))
    if numbers.random() < 0.3:
        return host(budget, max_sequences=sequences)
    ram = numbers.choice((0, numbers.randint(MIN_RING_BYTES, 8 * GIB)))
    return card(budget, ram, max_sequences=sequences)


def check_within_budgets(sizes: ModelSizes, request: PlanRequest, plan: Plan) -> None:
    home = Tier.RAM if request.vram is None else Tier.VRAM
    assert [place.layer for place in plan.layers] == list(range(len(sizes.layers)))
    for place, stored in zip(plan.layers, sizes.layers, strict=True):
        assert place.nbytes == (math.ceil(stored * sizes.expansion) if place.tier is home else stored)
        assert place.compute == request.device
    streamed = [place.nbytes for place in plan.layers if place.tier is not home]
    assert plan.slot_bytes >= max(streamed, default=0)
    assert all(use.nbytes > 0 for spending in (plan.vram, plan.ram) if spending for use in spending.uses)
    assert plan.ram.used <= plan.ram.budget
    assert plan.ram.budget == (request.ram or plan.ring_bytes)
    held = plan.ring_bytes + plan.layer_bytes(Tier.RAM)
    held += sizes.embedding if plan.embedding is Tier.RAM and not sizes.is_tied else 0
    held += plan.experts.ram_bytes
    assert (plan.ring_bytes > 0) == (plan.layer_bytes(Tier.DISK) > 0)
    assert plan.kv_bytes == plan.kv_tokens * sizes.kv_bytes_per_token
    if request.vram is None:
        check_host(sizes, plan, held)
    else:
        check_card(sizes, request, plan, streamed, held)


def check_host(sizes: ModelSizes, plan: Plan, held: int) -> None:
    assert plan.vram is None
    assert plan.device_slots == 0
    assert plan.head.num_blocks == 0
    converted = math.ceil(plan.slot_bytes * sizes.expansion) if sizes.expansion != 1 else 0
    rest = math.ceil(sizes.other * sizes.expansion) + math.ceil(sizes.head_bytes * sizes.expansion)
    assert plan.ram.used == held + rest + converted + plan.kv_bytes + plan.workspace_bytes


def check_card(sizes: ModelSizes, request: PlanRequest, plan: Plan, streamed: list[int], held: int) -> None:
    assert plan.vram is not None
    assert plan.vram.budget == request.vram
    assert plan.vram.used <= plan.vram.budget
    assert plan.ram.used == held
    assert bool(plan.device_slots) == bool(streamed or plan.head.num_blocks)
    converted = math.ceil(plan.slot_bytes * sizes.expansion) if sizes.expansion != 1 else 0
    resident = sum(place.nbytes for place in plan.layers if place.tier is Tier.VRAM)
    resident += 0 if plan.head.num_blocks else plan.head.nbytes
    resident += math.ceil(sizes.other * sizes.expansion)
    parts = resident + plan.device_slots * plan.slot_bytes + converted + plan.kv_bytes + plan.workspace_bytes
    assert parts <= plan.vram.used
    if plan.head.num_blocks:
        rows = -(-sizes.vocabulary // plan.head.num_blocks)
        assert rows * (sizes.head_bytes // sizes.vocabulary) <= plan.slot_bytes


def test_random_plans_stay_within_their_budgets() -> None:
    made = 0
    for seed in range(TRIALS):
        numbers = random.Random(seed)
        sizes, request = random_sizes(numbers), random_request(numbers)
        request = replace(request, expert_share=numbers.choice((0.0, 0.5)))
        plan = plan_or_none(sizes, request)
        if plan is not None:
            check_within_budgets(sizes, request, plan)
            made += 1

    assert made > TRIALS // 2


def test_more_budget_is_never_slower() -> None:
    for seed in range(TRIALS):
        numbers = random.Random(seed)
        sizes, request = random_sizes(numbers), random_request(numbers)
        last = math.inf
        steps = sorted(numbers.randint(0, 4 * GIB) for _ in range(8))
        for step in steps:
            more = replace(request, ram=MIN_RING_BYTES + step)
            if request.vram is not None and seed % 2:
                more = replace(request, vram=request.vram + step)
            plan = plan_or_none(sizes, more)
            if plan is None:
                assert math.isinf(last), (seed, step)
                continue
            now = seconds(sizes, plan, more)
            assert now <= last * (1 + 1e-9), (seed, step)
            last = now


def test_the_smallest_budget_that_is_named_works_and_one_byte_less_does_not() -> None:
    for seed in range(TRIALS):
        numbers = random.Random(seed)
        sizes, request = random_sizes(numbers), random_request(numbers)
        least = needed(sizes, request)
        field = "ram" if request.vram is None else "vram"

        exact = replace(request, **{field: least})
        check_within_budgets(sizes, exact, make_plan(sizes, exact))
        with pytest.raises(PlanError) as caught:
            make_plan(sizes, replace(request, **{field: least - 1}))
        assert caught.value.missing_bytes == 1


@pytest.mark.parametrize("total", [1, 2, 5, 16, 80])
def test_marks_are_spread_with_gaps_that_differ_by_one_at_most(total: int) -> None:
    for chosen in range(total + 1):
        marks = evenly(chosen, total)
        places = [place for place, is_marked in enumerate(marks) if is_marked]
        gaps = {
            (later - earlier) % total or total for earlier, later in zip(places, places[1:] + places[:1], strict=True)
        }
        assert len(places) == chosen
        assert all(gap in (total // chosen, -(-total // chosen)) for gap in gaps)


def test_tiers_of_equal_layers_are_interleaved_across_the_end_of_the_sweep() -> None:
    plan = make_plan(LLAMA_70B, card(24 * GIB, 60 * GIB))

    tiers = [place.tier for place in plan.layers]
    counts = {tier: tiers.count(tier) for tier in Tier}
    assert all(counts.values())
    assert longest_run(tiers, {Tier.RAM, Tier.DISK}) <= -(-80 // counts[Tier.VRAM])
    streamed = [tier for tier in tiers if tier is not Tier.VRAM]
    rarer, other = sorted((Tier.RAM, Tier.DISK), key=streamed.count)
    assert longest_run(streamed, {other}) <= -(-len(streamed) // streamed.count(rarer))


def longest_run(tiers: list[Tier], kinds: set[Tier]) -> int:
    """The longest run of `kinds` in an endless repetition of `tiers`."""
    longest = run = 0
    for tier in tiers * 2:
        run = run + 1 if tier in kinds else 0
        longest = max(longest, run)
    return longest


def test_a_model_that_fits_takes_no_slots_and_no_ring() -> None:
    plan = make_plan(LLAMA_7B, card(24 * GIB, GIB))

    assert {place.tier for place in plan.layers} == {Tier.VRAM}
    assert (plan.device_slots, plan.slot_bytes, plan.ring_bytes) == (0, 0, 0)
    assert plan.embedding is Tier.RAM
    assert (plan.head.tier, plan.head.num_blocks) == (Tier.VRAM, 0)


def test_two_slots_are_taken_before_any_layer_stays() -> None:
    plan = make_plan(LLAMA_7B, card(4 * GIB, 16 * GIB))

    assert plan.device_slots == 2
    assert plan.slot_bytes == LLAMA_7B.layers[0]
    assert 0 < sum(place.tier is Tier.VRAM for place in plan.layers) < 16
    assert plan.layer_bytes(Tier.DISK) == 0
    assert plan.ring_bytes == 0


def test_one_slot_does_where_two_do_not_fit() -> None:
    least = needed(LLAMA_70B, card(1, 0))

    plan = make_plan(LLAMA_70B, card(least, 0))

    assert plan.device_slots == 1
    assert plan.head.num_blocks == 1  # smaller than a layer, and no room beside it
    assert plan.head.tier is Tier.DISK


def test_a_head_larger_than_a_slot_streams_in_blocks_that_fit_it() -> None:
    sizes = replace(LLAMA_7B, head=4 * GIB, embedding=4 * GIB, vocabulary=256_000)

    plan = make_plan(sizes, card(3 * GIB, 32 * GIB))

    assert plan.head.tier is Tier.RAM
    assert plan.head.num_blocks == -(-256_000 // (plan.slot_bytes // -(-4 * GIB // 256_000)))
    assert plan.head.num_blocks > 9


def test_a_tied_head_on_the_device_is_the_embedding_table() -> None:
    sizes = replace(LLAMA_7B, head=0, is_tied=True)

    assert make_plan(sizes, card(4 * GIB, 16 * GIB)).embedding is Tier.VRAM
    assert make_plan(sizes, host(16 * GIB)).embedding is Tier.RAM


def test_no_ram_leaves_a_ring_and_nothing_else() -> None:
    plan = make_plan(LLAMA_70B, card(8 * GIB, 0))

    assert plan.layer_bytes(Tier.RAM) == 0
    assert plan.embedding is Tier.DISK
    assert plan.ram.budget == plan.ram.used == plan.ring_bytes == RING_BYTES


def test_a_ram_budget_below_the_smallest_ring_is_refused_with_both_ways_out() -> None:
    with pytest.raises(PlanError, match=r"64MiB.*or 0") as caught:
        make_plan(LLAMA_70B, card(8 * GIB, 10 * MIB))

    assert caught.value.missing_bytes == MIN_RING_BYTES - 10 * MIB


def test_a_cpu_streams_through_whole_slots() -> None:
    plan = make_plan(LLAMA_7B, host(4 * GIB))

    assert plan.ring_bytes == 3 * plan.slot_bytes
    assert plan.slot_bytes >= LLAMA_7B.layers[0]
    assert {place.tier for place in plan.layers} == {Tier.RAM, Tier.DISK}


def test_a_cpu_with_room_reads_nothing_from_disk() -> None:
    plan = make_plan(LLAMA_7B, host(32 * GIB))

    assert plan.layer_bytes(Tier.DISK) == plan.ring_bytes == 0
    assert plan.embedding is Tier.RAM


@pytest.mark.parametrize("request_", [card(GIB // 2, GIB), host(GIB // 2)], ids=["card", "cpu"])
def test_a_refusal_says_how_much_is_missing_and_what_would_do(request_: PlanRequest) -> None:
    option = "ram" if request_.vram is None else "vram"

    with pytest.raises(PlanError) as caught:
        make_plan(LLAMA_70B, request_)

    message = str(caught.value)
    assert f"a {option} budget of 512.0 MiB" in message
    assert f"{caught.value.missing_bytes:,} bytes" in message
    assert f'--{option} "' in message


def test_a_cache_that_was_asked_for_is_kept_to_the_letter_or_refused_with_what_fits() -> None:
    assert make_plan(LLAMA_7B, card(4 * GIB, 16 * GIB, kv_tokens=10_000)).kv_tokens == 10_000

    with pytest.raises(PlanError, match=r"--kv-tokens (\d+) fits") as caught:
        make_plan(LLAMA_7B, card(4 * GIB, 16 * GIB, kv_tokens=1_000_000))

    fits = int(str(caught.value).split("--kv-tokens ")[1].split()[0])
    assert make_plan(LLAMA_7B, card(4 * GIB, 16 * GIB, kv_tokens=fits)).kv_tokens == fits
    with pytest.raises(PlanError):
        make_plan(LLAMA_7B, card(4 * GIB, 16 * GIB, kv_tokens=fits + 16))


def test_a_derived_cache_shrinks_to_one_sequence_before_the_plan_is_refused() -> None:
    least = needed(LLAMA_7B, card(1, 0, max_sequences=64))

    assert make_plan(LLAMA_7B, card(least, 0, max_sequences=64)).kv_tokens == 2048
    assert make_plan(LLAMA_7B, card(80 * GIB, 0, max_sequences=64)).kv_tokens == 64 * 2048


def test_what_no_layer_can_use_goes_to_the_cache_and_the_sweep() -> None:
    spare, whole = [], 0
    for seed in range(TRIALS):
        numbers = random.Random(seed)
        sizes, request = random_sizes(numbers), replace(random_request(numbers), sweep_tokens=None, kv_tokens=None)
        plan = plan_or_none(sizes, request)
        if plan is None:
            continue
        spending = plan.ram if plan.vram is None else plan.vram
        if plan.kv_tokens >= request.max_sequences * min(2048, sizes.context_length):
            whole += 1
            continue
        step = 16 * sizes.kv_bytes_per_token + 2 * len(sizes.layers) * 4 * MIB  # a page, as a GPU's allocator rounds it
        gathered = workspace_bytes(sizes, 64, request.max_sequences, 2 * plan.kv_tokens)
        assert spending.budget - spending.used < step + gathered, seed
        spare.append((spending.budget - spending.used) / spending.budget)

    assert whole > TRIALS // 10
    assert sum(spare) / len(spare) < 0.01


def test_a_tight_card_has_more_cache_from_what_no_layer_can_use_unless_a_size_was_asked_for() -> None:
    asked = make_plan(LLAMA_7B, card(8 * GIB, 0, max_sequences=16, kv_tokens=2048, sweep_tokens=64))
    derived = make_plan(LLAMA_7B, card(8 * GIB, 0, max_sequences=16))

    assert (asked.kv_tokens, asked.sweep_tokens) == (2048, 64)
    assert derived.vram is not None
    assert derived.vram.budget - derived.vram.used < LLAMA_7B.layers[0] // 4
    assert derived.kv_bytes > derived.vram.budget // 8
    assert sum(place.tier is Tier.VRAM for place in derived.layers) > 10


def test_sweep_tokens_are_as_many_as_ride_for_free() -> None:
    slow = make_plan(LLAMA_7B, replace(card(4 * GIB, 0), vram=4 * GIB))
    resident = make_plan(LLAMA_7B, card(24 * GIB, 0))

    assert MIN_SWEEP_TOKENS <= resident.sweep_tokens < slow.sweep_tokens <= MAX_SWEEP_TOKENS
    assert make_plan(LLAMA_7B, card(4 * GIB, 0, sweep_tokens=777)).sweep_tokens == 777


def test_the_workspace_is_that_of_the_planned_sweep() -> None:
    plan = make_plan(LLAMA_7B, card(8 * GIB, 0))

    at_least = workspace_bytes(LLAMA_7B, plan.sweep_tokens, 8, plan.kv_tokens)
    assert at_least <= plan.workspace_bytes < at_least + 64 * 2 * MIB


def test_weights_stored_in_another_type_get_room_to_be_converted() -> None:
    sizes = replace(LLAMA_7B, expansion=2.0)

    plan = make_plan(sizes, card(6 * GIB, 0))

    assert plan.vram is not None
    uses = {use.what: use.nbytes for use in plan.vram.uses}
    assert uses["converted piece"] >= 2 * plan.slot_bytes
    assert {place.nbytes for place in plan.layers if place.tier is Tier.VRAM} == {2 * sizes.layers[0]}
    assert {place.nbytes for place in plan.layers if place.tier is Tier.DISK} == {sizes.layers[0]}


def test_small_layers_stay_where_large_ones_cannot() -> None:
    small, large = 10 * MIB, 900 * MIB
    sizes = replace(LLAMA_7B, layers=(small, *(large,) * 20, small, small))

    plan = make_plan(sizes, card(needed(sizes, card(1, 0)) + GIB, 0))

    assert [plan.layers[index].tier for index in (0, 21, 22)] == [Tier.VRAM] * 3


@pytest.mark.parametrize("wrong", [{"max_sequences": 0}, {"kv_tokens": 0}, {"sweep_tokens": 4, "max_sequences": 8}])
def test_requests_that_cannot_work_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        card(GIB, GIB, **wrong)


def test_a_device_budget_goes_with_a_device() -> None:
    with pytest.raises(OptionError):
        PlanRequest("cpu", GIB, GIB, CPU)
    with pytest.raises(OptionError):
        PlanRequest("cuda:0", None, GIB, CARD)


def packed_70b(share: float) -> ModelSizes:
    """LLAMA_70B in four bits, but for a `share` of its layers, which is not packed."""
    full = LLAMA_70B.layers[0]
    whole = round(share * len(LLAMA_70B.layers))
    layers = tuple(full if index < whole else full // 4 for index in range(len(LLAMA_70B.layers)))
    return replace(LLAMA_70B, layers=layers, computed=(full,) * len(layers), expansion=4.0, root_expansion=1.0)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_packed_layers_stay_packed_where_that_lets_more_of_them_stay(share: float) -> None:
    sizes = packed_70b(share)
    full = LLAMA_70B.layers[0]

    small = make_plan(sizes, card(24 * GIB, 60 * GIB))
    large = make_plan(sizes, card(200 * GIB, 60 * GIB))

    assert small.keeps_packed
    assert sum(place.tier is Tier.VRAM for place in small.layers) > 2 * (24 * GIB // full)
    assert small.vram is not None
    converted = next(use.nbytes for use in small.vram.uses if use.what == "converted piece")
    assert full <= converted < full + 4 * MIB
    assert not large.keeps_packed
    assert {place.nbytes for place in large.layers} == {full}
    assert all(plan.vram is not None and plan.vram.used <= plan.vram.budget for plan in (small, large))
