"""Everyone who runs gets a token a sweep; prompts share what is left; who came first is never sent back."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from lamella_engine.sequence_types import SequencePrefill
from tests.engine.simulated_sweeps import SimulatedSweeps, make_sequence


def test_decoding_sequences_ride_every_sweep_beside_a_long_prompt() -> None:
    sweeps = SimulatedSweeps(sweep_tokens=100)
    sweeps.submit(*(make_sequence(f"short{i}", 4) for i in range(3)))
    sweeps.sweep()
    sweeps.submit(make_sequence("long", 30_000))

    counts = sweeps.sweep()

    assert counts == {"long": 97, "short0": 1, "short1": 1, "short2": 1}


def test_half_of_what_is_left_is_for_all_prompts_and_half_for_the_shortest_first() -> None:
    sweeps = SimulatedSweeps(sweep_tokens=103)
    sweeps.submit(make_sequence("a", 1000), make_sequence("b", 10), make_sequence("c", 1000))

    counts = sweeps.sweep()

    # A part of 100 // 6 and the one each has anyway; the 59 that are left go to the older of the two long ones.
    assert counts == {"a": 17 + 59, "b": 10, "c": 17}


def test_a_budget_of_one_token_each_is_enough_for_everyone() -> None:
    sweeps = SimulatedSweeps(sweep_tokens=16, max_sequences=16)
    sweeps.submit(*(make_sequence(str(i), 500) for i in range(16)))

    counts = sweeps.sweep()

    assert counts == {str(i): 1 for i in range(16)}


def test_more_sequences_than_the_budget_carries_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="every sweep"):
        SimulatedSweeps(sweep_tokens=4, max_sequences=5)


def test_a_very_long_prompt_delays_nobodys_token() -> None:
    sweeps = SimulatedSweeps(max_sequences=6, sweep_tokens=256)
    sweeps.submit(*(make_sequence(f"early{i}", 20, max_tokens=40) for i in range(3)))
    sweeps.sweep()
    sweeps.submit(make_sequence("long", 30_000, max_tokens=4))
    arrivals = {}
    while not sweeps.is_idle:
        if sweeps.sweeps % 20 == 5 and sweeps.sweeps < 85:
            name = f"late{sweeps.sweeps}"
            arrivals[name] = sweeps.sweeps
            sweeps.submit(make_sequence(name, 60, max_tokens=10))
        sweeps.sweep()

    gaps = {later - former for times in sweeps.token_sweeps.values() for former, later in pairwise(times)}
    assert gaps == {1}, "a token in every sweep once the first one came"
    assert len(arrivals) == 4
    for name, sweep in arrivals.items():
        assert sweeps.token_sweeps[name, 0][0] == sweep, "a short prompt is read in the sweep it arrives at"
    assert sweeps.sweeps <= 30_000 // 245 + 10, "what the others do not need is the long prompt's"


def test_a_long_prompt_moves_on_however_many_short_ones_come() -> None:
    sweeps = SimulatedSweeps(max_sequences=8, sweep_tokens=64)
    long = make_sequence("long", 1000)
    sweeps.submit(long)
    sweeps.sweep()
    before = long.computed

    for index in range(60):
        sweeps.submit(make_sequence(f"short{index}", 50, max_tokens=1))
        counts = sweeps.sweep()
        assert counts["long"] >= 4

    assert long.computed - before >= 240


def test_pages_are_taken_as_a_sequence_grows() -> None:
    sweeps = SimulatedSweeps(capacity=1024)
    sweeps.submit(make_sequence("a", 17, max_tokens=500))

    sweeps.sweep()
    used = [sweeps.cache.capacity_tokens - sweeps.cache.free_tokens]
    for _ in range(31):
        sweeps.sweep()
        used.append(sweeps.cache.capacity_tokens - sweeps.cache.free_tokens)

    assert used == [32] * 16 + [48] * 16


def test_a_sequence_waits_until_its_prompt_and_a_page_for_each_that_runs_are_free() -> None:
    sweeps = SimulatedSweeps(capacity=5 * 16)
    sweeps.submit(make_sequence("a", 20, max_tokens=9), make_sequence("b", 40, max_tokens=2))

    for _ in range(9):
        sweeps.sweep()
        assert [sequence.sequence_id for sequence in sweeps.scheduler.waiting] == ["b"]
    sweeps.sweep()

    # Beside a, 3 pages of a pool of 5 are free: enough for b's prompt, not for a page to grow into as well.
    assert sweeps.token_sweeps["b", 0] == [9]
    assert sweeps.scheduler.preemptions == 0


def test_the_youngest_makes_room_keeps_its_tokens_and_is_next_when_room_is() -> None:
    sweeps = SimulatedSweeps(capacity=7 * 16)
    old, young, third = (
        make_sequence("old", 30, max_tokens=50),
        make_sequence("young", 30, max_tokens=40),
        make_sequence("third", 30, max_tokens=2),
    )
    sweeps.submit(old, young)
    sweeps.sweep()
    sweeps.submit(third)

    while not sweeps.scheduler.preemptions:
        sweeps.sweep()
    kept = list(young.generated_ids)

    assert sweeps.scheduler.running == [old]
    assert [*sweeps.scheduler.waiting] == [young, third]
    assert kept
    assert young.computed == 0
    sweeps.run(200)
    assert young.generated_ids[: len(kept)] == kept
    assert [len(sequence.generated_ids) for sequence in sweeps.ended] == [50, 2, 40]
    assert sweeps.token_sweeps["old", 0] == list(range(50)), "the oldest got a token in every sweep"


def test_what_is_read_again_is_not_told_again() -> None:
    sweeps = SimulatedSweeps(capacity=7 * 16, sweep_tokens=20)
    old, young = make_sequence("old", 10, max_tokens=90), make_sequence("young", 60, max_tokens=2)
    told: list[SequencePrefill] = []
    sweeps.submit(old, young)
    while not sweeps.is_idle:
        sweeps.sweep()
        if (event := young.prefilled()) is not None and young.is_reading:
            told.append(event)
        if sweeps.sweeps == 2:
            sweeps.scheduler.preempt(sweeps.scheduler.running[-1])

    read = [event.prefilled_tokens for event in told]
    assert sweeps.scheduler.preemptions >= 1
    assert read == sorted(set(read))
    assert {event.prompt_tokens for event in told} == {60}


def test_samples_share_the_prompt_and_part_at_their_first_token() -> None:
    sweeps = SimulatedSweeps(capacity=1 << 12, sweep_tokens=512)
    sweeps.submit(make_sequence("a", 1000, max_tokens=20, num_samples=8))

    sweeps.sweep()
    sweeps.sweep()
    after_prompt = sweeps.cache.capacity_tokens - sweeps.cache.free_tokens
    sweeps.sweep()
    parted = sweeps.cache.capacity_tokens - sweeps.cache.free_tokens
    sweeps.run(30)

    assert after_prompt == 1008
    assert parted == 1008 + 7 * 16, "the first seven copy the last page, the eighth keeps it"
    assert sorted(len(sequence.generated_ids) for sequence in sweeps.ended) == [20] * 8
    assert sweeps.cache.free_tokens == sweeps.cache.capacity_tokens


def test_samples_take_a_place_each_before_they_start() -> None:
    sweeps = SimulatedSweeps(max_sequences=4, sweep_tokens=16)
    sweeps.submit(make_sequence("three", 40, max_tokens=3, num_samples=3), make_sequence("two", 5, num_samples=2))

    counts = sweeps.sweep()

    assert counts == {"three": 16}
    sweeps.run(60)
    assert len(sweeps.ended) == 5


def test_removing_everyone_frees_the_whole_cache() -> None:
    sweeps = SimulatedSweeps(capacity=512, max_sequences=4)
    sweeps.submit(*(make_sequence(str(i), 33, num_samples=2) for i in range(6)))
    sweeps.sweep()
    sweeps.sweep()

    for index in range(6):
        for sequence in sweeps.scheduler.find(str(index)):
            sweeps.scheduler.remove(sequence)

    assert sweeps.cache.free_tokens == sweeps.cache.capacity_tokens
    assert sweeps.is_idle


@pytest.mark.parametrize("seed", range(40))
def test_any_workload_ends_and_keeps_every_rule(seed: int) -> None:
    """The rules themselves are checked by `SimulatedSweeps` at every sweep."""
    dice = random.Random(seed)
    max_sequences = dice.choice([1, 2, 5, 12])
    capacity = 16 * dice.choice([3, 6, 10, 40])
    sweeps = SimulatedSweeps(capacity, max_sequences, max_sequences + dice.choice([0, 1, 7, 60]))
    expected, bound = {}, 0
    for index in range(dice.randint(4, 24)):
        prompt = dice.randint(1, capacity - 1)
        max_tokens = dice.choice([1, 3, 20, 60])
        samples = dice.randint(1, max_sequences) if dice.random() < 0.4 else 1
        expected[str(index)] = (prompt, min(max_tokens, capacity - prompt), samples)
        bound += samples * (prompt + max_tokens)
    arriving, cancelled = sorted(expected, key=int), set()

    while arriving or not sweeps.is_idle:
        while arriving and (sweeps.is_idle or dice.random() < 0.3):
            prompt, max_tokens, samples = expected[arriving[0]]
            sweeps.submit(make_sequence(arriving.pop(0), prompt, max_tokens, samples, context_length=capacity))
        if dice.random() < 0.01 and (alive := [*sweeps.scheduler.running, *sweeps.scheduler.waiting]):
            name = dice.choice(alive).sequence_id
            cancelled.add(name)
            for sequence in sweeps.scheduler.find(name):
                sweeps.scheduler.remove(sequence)
            continue
        oldest = next(iter((*sweeps.scheduler.running, *sweeps.scheduler.waiting)))
        before = oldest.computed
        sweeps.sweep()
        assert oldest.computed > before, "the oldest moves on in every sweep"
        assert sweeps.sweeps <= bound

    ended = {(sequence.sequence_id, sequence.sample): len(sequence.generated_ids) for sequence in sweeps.ended}
    for name, (_, max_tokens, samples) in expected.items():
        if name not in cancelled:
            assert [ended[name, sample] for sample in range(samples)] == [max_tokens] * samples
    assert sweeps.cache.free_tokens == sweeps.cache.capacity_tokens


def test_a_small_cache_sends_sequences_back_again_and_again_and_all_end() -> None:
    sweeps = SimulatedSweeps(capacity=10 * 16, max_sequences=5, sweep_tokens=12)
    sweeps.submit(*(make_sequence(str(i), 20, max_tokens=60, num_samples=1 + i % 3) for i in range(8)))

    sweeps.run(8 * 3 * 80)

    assert sweeps.scheduler.preemptions > 5
    assert len(sweeps.ended) == 1 + 2 + 3 + 1 + 2 + 3 + 1 + 2
