"""Runs a scheduler and its cache without a model, and checks at every sweep what must always hold.

Keys are the token ids themselves, so what attention would read of a sequence can be compared with what it should be.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch

from lamella_engine.kv_cache import PAGE_TOKENS, KVCache
from lamella_engine.sampler import Choice
from lamella_engine.scheduler import Ride, Scheduler
from lamella_engine.sequence import Sequence
from lamella_engine.sequence_types import Sampling, SequenceRequest


def make_sequence(
    name: str, prompt_tokens: int, max_tokens: int = 16, num_samples: int = 1, context_length: int = 100_000
) -> Sequence:
    """A sequence with a prompt of its own: no two names share tokens."""
    request = SequenceRequest(name, Sampling(max_tokens=max_tokens), num_samples=num_samples)
    base = sum(ord(letter) << (3 * index) for index, letter in enumerate(name)) % 200_000
    prompt = [base + index for index in range(prompt_tokens)]
    first, *first.siblings = [
        Sequence(request, prompt, None, frozenset(), context_length, sample) for sample in range(num_samples)
    ]
    return first


class SimulatedSweeps:
    """A scheduler on a cache of `capacity` tokens, and everything it has done."""

    def __init__(self, capacity: int = 1 << 16, max_sequences: int = 8, sweep_tokens: int = 100) -> None:
        self.cache = KVCache(capacity, torch.device("cpu"))
        self.scheduler = Scheduler(self.cache, max_sequences, sweep_tokens)
        self.max_sequences, self.sweep_tokens = max_sequences, sweep_tokens
        self.sweeps = 0
        self.ages: dict[str, int] = {}
        self.token_sweeps: dict[tuple[str, int], list[int]] = {}  # (id, sample) -> the sweep of each token
        self.ended: list[Sequence] = []

    def submit(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.ages[sequence.sequence_id] = len(self.ages)
        self.scheduler.waiting.extend(sequences)

    @property
    def is_idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.waiting

    def sweep(self) -> dict[str, int]:
        """One sweep; how many tokens each id brought to it."""
        self.scheduler.admit()
        rides = self.scheduler.rides()
        self.check_ownership()
        self._check_rides(rides)
        for ride in rides:
            self._compute(ride)
        for ride in rides:
            ride.sequence.ride(len(ride.span.token_ids), 0)
            if ride.completes:
                for sequence in self.scheduler.fork(ride.sequence):
                    self._accept(sequence)
        self.sweeps += 1
        counts: Counter[str] = Counter()
        for ride in rides:
            counts[ride.sequence.sequence_id] += len(ride.span.token_ids)
        return dict(counts)

    def run(self, max_sweeps: int) -> None:
        """Sweep until everyone has ended."""
        for _ in range(max_sweeps):
            if self.is_idle:
                return
            self.sweep()
        raise AssertionError(f"{[s.sequence_id for s in self.scheduler.running]} run after {max_sweeps} sweeps")

    def check_ownership(self) -> None:
        """No page is lost, nobody who waits has one, and only samples of one prompt share."""
        holders: dict[int, set[str]] = {}
        for sequence in self.scheduler.running:
            assert sequence.table is not None
            assert len(set(sequence.table.pages)) == len(sequence.table.pages)
            for page in sequence.table.pages:
                holders.setdefault(page, set()).add(sequence.sequence_id)
        assert all(sequence.table is None for sequence in self.scheduler.waiting)
        assert all(len(names) == 1 for names in holders.values())
        assert len(holders) * PAGE_TOKENS + self.cache.free_tokens == self.cache.capacity_tokens

    def _check_rides(self, rides: list[Ride]) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert [ride.sequence for ride in rides] == running, "everyone who runs rides"
        assert rides, "somebody moves on in every sweep"
        assert sum(len(ride.span.token_ids) for ride in rides) <= self.sweep_tokens
        assert sum(sequence.places for sequence in running) <= self.max_sequences
        line = [(self.ages[sequence.sequence_id], sequence.sample) for sequence in (*running, *waiting)]
        assert all(older < younger for older, younger in pairwise(line)), "the oldest run, the youngest wait"
        for ride in rides:
            assert ride.span.token_ids
            assert ride.completes or ride.sequence.is_reading, "who decodes gets its token"

    def _compute(self, ride: Ride) -> None:
        """Store the span's tokens as keys, and read back what attention would."""
        span, sequence = ride.span, ride.sequence
        keys = torch.tensor(span.token_ids, dtype=torch.float32)[:, None, None]
        self.cache.store(0, span.slots[span.start : span.end], keys, -keys)
        seen, negative = self.cache.load(0, span.slots[: span.end])
        tokens = [*sequence.prompt_ids, *sequence.generated_ids][: span.end]
        assert seen.flatten().tolist() == tokens
        assert negative.flatten().tolist() == [-token for token in tokens]

    def _accept(self, sequence: Sequence) -> None:
        position = len(sequence.generated_ids)
        token = 1_000_000 + (self.ages[sequence.sequence_id] * 64 + sequence.sample) * 4096 + position
        sequence.accept(Choice(token, None))
        event = sequence.news()
        assert event is not None
        assert (event.position, event.sample) == (position, sequence.sample)
        self.token_sweeps.setdefault((sequence.sequence_id, sequence.sample), []).append(self.sweeps)
        if sequence.reason is not None:
            self.scheduler.remove(sequence)
            self.ended.append(sequence)
