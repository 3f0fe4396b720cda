"""Everyone gets a token a sweep; long prompts share what is left; nobody is admitted without room."""

from __future__ import annotations

import torch

from lamella_engine.kv_cache import KVCache
from lamella_engine.scheduler import Scheduler
from lamella_engine.sequence import Sequence
from lamella_engine.sequence_types import Sampling, SequenceRequest


def make_sequence(name: str, prompt_tokens: int, max_tokens: int = 16) -> Sequence:
    request = SequenceRequest(name, Sampling(max_tokens=max_tokens))
    return Sequence(request, [1] * prompt_tokens, None, frozenset(), context_length=100_000)


def make_scheduler(capacity: int = 1 << 20, max_sequences: int = 8, sweep_tokens: int = 100) -> Scheduler:
    return Scheduler(KVCache(capacity, torch.device("cpu")), max_sequences, sweep_tokens)


def counts(scheduler: Scheduler) -> dict[str, int]:
    return {ride.sequence.sequence_id: len(ride.span.token_ids) for ride in scheduler.rides()}


def test_decoding_sequences_ride_every_sweep_beside_a_long_prompt() -> None:
    scheduler = make_scheduler(sweep_tokens=100)
    decoding = [make_sequence(f"short{i}", 4) for i in range(3)]
    for sequence in decoding:
        sequence.computed = 3
    scheduler.waiting.extend([make_sequence("long", 30_000), *decoding])

    scheduler.admit()

    assert counts(scheduler) == {"long": 97, "short0": 1, "short1": 1, "short2": 1}


def test_prompts_share_the_budget_evenly_and_short_ones_leave_their_rest_to_others() -> None:
    scheduler = make_scheduler(sweep_tokens=100)
    scheduler.waiting.extend([make_sequence("a", 1000), make_sequence("b", 10), make_sequence("c", 1000)])

    scheduler.admit()

    assert counts(scheduler) == {"a": 45, "b": 10, "c": 45}


def test_a_sweep_never_carries_more_than_its_budget() -> None:
    scheduler = make_scheduler(sweep_tokens=16, max_sequences=16)
    scheduler.waiting.extend([make_sequence(str(i), 500) for i in range(16)])

    scheduler.admit()

    assert sum(counts(scheduler).values()) == 16


def test_a_sequence_waits_until_the_cache_can_hold_it_whole() -> None:
    scheduler = make_scheduler(capacity=64)
    first, second = make_sequence("first", 20, max_tokens=20), make_sequence("second", 20, max_tokens=20)
    scheduler.waiting.extend([first, second])

    scheduler.admit()
    assert scheduler.running == [first]
    scheduler.remove(first)
    scheduler.admit()

    assert scheduler.running == [second]


def test_removing_everyone_frees_the_whole_cache() -> None:
    cache = KVCache(1024, torch.device("cpu"))
    scheduler = Scheduler(cache, 4, 64)
    sequences = [make_sequence(str(i), 33) for i in range(6)]
    scheduler.waiting.extend(sequences)
    scheduler.admit()

    for sequence in sequences:
        scheduler.remove(sequence)

    assert cache.free_tokens == cache.capacity_tokens
    assert not scheduler.waiting
    assert not scheduler.running


def test_reserved_slots_never_overlap() -> None:
    cache = KVCache(1000, torch.device("cpu"))

    first, second = cache.reserve(100), cache.reserve(50)

    assert first is not None
    assert second is not None
    assert not set(first.tolist()) & set(second.tolist())
    assert cache.reserve(10_000) is None
