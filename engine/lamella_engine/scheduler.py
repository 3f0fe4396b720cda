"""Decides who rides the next sweep and with how many tokens.

Sequences join and leave between sweeps only. Every decoding sequence gets its one token in every sweep; what is left
of the sweep's token budget is shared evenly among the sequences whose prompts are being read, so a long prompt delays
nobody by more than a sweep. A sequence is admitted once the key-value cache can hold all it may ever need.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from lamella_engine.kv_cache import KVCache
from lamella_engine.packing import Span
from lamella_engine.sequence import Sequence


class Ride(NamedTuple):
    """One sequence's part in a sweep; `completes` says that its next token is chosen after it."""

    sequence: Sequence
    span: Span
    completes: bool


class Scheduler:
    """The sequences of one engine; used by the sweep thread only."""

    def __init__(self, cache: KVCache, max_sequences: int, sweep_tokens: int) -> None:
        self._cache = cache
        self._max_sequences = max_sequences
        self._sweep_tokens = sweep_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def admit(self) -> None:
        """Move waiting sequences, oldest first, to the running ones while there is room."""
        while self.waiting and len(self.running) < self._max_sequences:
            slots = self._cache.reserve(self.waiting[0].max_length)
            if slots is None:
                return
            sequence = self.waiting.popleft()
            sequence.slots = slots
            self.running.append(sequence)

    def rides(self) -> list[Ride]:
        """Everyone's span for the next sweep, within the token budget."""
        counts = {id(sequence): 1 for sequence in self.running if sequence.pending == 1}
        readers = [sequence for sequence in self.running if sequence.pending > 1]
        budget = self._sweep_tokens - len(counts)
        for index, sequence in enumerate(sorted(readers, key=lambda s: s.pending)):
            share = max(1, budget // (len(readers) - index))
            counts[id(sequence)] = min(sequence.pending, share)
            budget -= counts[id(sequence)]
        return [
            Ride(sequence, sequence.span(count), count == sequence.pending)
            for sequence, count in ((s, counts[id(s)]) for s in self.running)
        ]

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence go, wherever it is, and free its part of the cache."""
        if sequence.slots is not None:
            self._cache.release(sequence.slots)
            sequence.slots = None
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def find(self, sequence_id: str) -> Sequence | None:
        """The live sequence of that id, or None."""
        for sequence in (*self.running, *self.waiting):
            if sequence.sequence_id == sequence_id:
                return sequence
        return None
