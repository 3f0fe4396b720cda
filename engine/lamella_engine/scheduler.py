"""Decides who rides the next sweep and with how many tokens, and who waits when the key-value cache runs short.

Owns the order of the sequences: `running` and behind it `waiting` are one line, oldest first. At a sweep boundary the
running ones get the pages they are about to write, oldest first; if there are none left, the youngest goes back to the
head of the waiting ones and later computes again what it had. So the oldest always moves on, and everyone becomes the
oldest one day. Pages belong to `kv_cache`, tokens and events to `sequence`; `engine` calls.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from lamella_engine.kv_cache import KVCache, PageCopy, pages_for
from lamella_engine.packing import Span
from lamella_engine.sequence import Sequence


class Ride(NamedTuple):
    """One sequence's part in a sweep; `completes` says that its next token is chosen after it."""

    sequence: Sequence
    span: Span
    completes: bool


class Scheduler:
    """The sequences of one engine; used by the sweep thread only.

    Attributes:
        running: those that hold pages and ride every sweep, oldest first.
        waiting: those that came later or were preempted, oldest first.
        preemptions: how often one that ran was sent back.
    """

    def __init__(self, cache: KVCache, max_sequences: int, sweep_tokens: int) -> None:
        assert max_sequences <= sweep_tokens, "everyone who runs gets a token in every sweep"
        self._cache = cache
        self._max_sequences = max_sequences
        self._sweep_tokens = sweep_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def admit(self) -> None:
        """Move waiting sequences, oldest first, to the running ones while there is room."""
        while self.waiting and self._has_room(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.table = self._cache.open_table(sequence.length)
            assert sequence.table is not None, "the engine refuses what does not fit an empty cache"
            self.running.append(sequence)

    def rides(self) -> list[Ride]:
        """Everyone's span for the next sweep, within the token budget and with pages to write to."""
        self._grow()
        return [
            Ride(sequence, sequence.span(count), count == sequence.pending)
            for sequence, count in zip(self.running, self._counts(), strict=True)
        ]

    def fork(self, sequence: Sequence) -> list[Sequence]:
        """Start the samples that wait for this one's prompt, on the same pages; it and they, in order."""
        siblings, sequence.siblings = sequence.siblings, []
        if siblings:
            assert sequence.table is not None, "a prompt that was read is in the cache"
            for sibling in siblings:
                sibling.table = self._cache.share(sequence.table, sequence.computed)
                sibling.computed = sequence.computed
            behind = self.running.index(sequence) + 1
            self.running[behind:behind] = siblings
        return [sequence, *siblings]

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence go, wherever it is, and free its part of the cache."""
        if sequence.table is not None:
            self._cache.release(sequence.table)
            sequence.table = None
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def find(self, sequence_id: str) -> list[Sequence]:
        """The live sequences of that id, one a sample; a sample that waits for the prompt is with its first one."""
        return [sequence for sequence in (*self.running, *self.waiting) if sequence.sequence_id == sequence_id]

    def _has_room(self, sequence: Sequence) -> bool:
        """True if it can run now and everyone, it included, is likely to go on for a while.

        A page to grow into for each that runs keeps newcomers from taking what would preempt them a few sweeps later.
        """
        if not self.running:
            return True
        places = sum(other.places for other in self.running)
        if places + sequence.places > self._max_sequences:
            return False
        growth = places + len(sequence.siblings)
        return pages_for(sequence.length) + growth <= self._cache.free_pages

    def _grow(self) -> None:
        """Give everyone the pages it is about to write, oldest first, at the cost of the youngest."""
        copies: list[PageCopy] = []
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            assert sequence.table is not None, "who runs has a table"
            grown = self._cache.grow(sequence.table, sequence.computed, sequence.length)
            if grown is None:
                self._preempt_youngest()  # perhaps this one itself, never one that was served before it
            else:
                copies += grown
                index += 1
        self._cache.copy_pages(copies)

    def _preempt_youngest(self) -> None:
        assert len(self.running) > 1, "the engine refuses what does not fit an empty cache"
        sequence = self.running.pop()
        assert sequence.table is not None, "who runs has a table"
        self._cache.release(sequence.table)
        sequence.table = None
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _counts(self) -> list[int]:
        """Tokens each running sequence brings, at least one; together no more than the budget.

        Those that decode bring all they have. Of what is left, half goes to the prompts in equal parts, so that a long
        one moves on however many short ones come, and half to the shortest first, so that short ones wait for none.
        """
        counts = [1] * len(self.running)
        left = self._sweep_tokens - len(counts)

        def bring(index: int, tokens: int) -> None:
            nonlocal left
            more = max(0, min(tokens - counts[index], left))
            counts[index] += more
            left -= more

        readers = []
        for index, sequence in enumerate(self.running):
            if sequence.is_reading:
                readers.append(index)
            else:
                bring(index, sequence.pending)
        readers.sort(key=lambda index: self.running[index].pending)
        part = 1 + left // (2 * len(readers)) if readers else 0
        for index in readers:
            bring(index, min(part, self.running[index].pending))
        for index in readers:
            bring(index, self.running[index].pending)
        return counts
