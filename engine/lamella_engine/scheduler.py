"""Decides who rides the next sweep and with how many tokens, and who waits when the key-value cache runs short.

Owns the order of the sequences: `running` and behind it `waiting` are one line, oldest first. At a sweep boundary the
running ones get the pages they are about to write, oldest first; if there are none left, the youngest goes back to the
head of the waiting ones and later computes again what it had. So the oldest always moves on, and everyone becomes the
oldest one day. Pages belong to `kv_cache`, tokens and events to `sequence`; `engine` calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

from lamella_engine.kv_cache import PageCopy
from lamella_engine.packing import Span
from lamella_engine.sequence import Sequence
from lamella_engine.stepwise import StepSpan

Place = TypeVar("Place")


class Ride(NamedTuple):
    """One sequence's part in a sweep; `completes` says that its next token is chosen after it."""

    sequence: Sequence
    span: Span | StepSpan
    completes: bool


class Pool(Protocol[Place]):
    """The memory that sequences run in, in pages: `kv_cache.KVCache` or `state_pool.StatePool`."""

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence of `tokens` tokens needs."""

    def open_table(self, tokens: int) -> Place | None:
        """A place for `tokens` tokens; None, and nothing taken, if the pool is short."""

    def grow(self, table: Place, start: int, end: int) -> list[PageCopy] | None:
        """Let `table`, with `start` tokens computed, have `end`; what must be copied, or None if the pool is short."""

    def share(self, table: Place, computed: int) -> Place | None:
        """A place for one that goes on from the first `computed` tokens; None if the pool is short."""

    def release(self, table: Place) -> None:
        """Free what `table` holds."""

    def copy_pages(self, copies: list[PageCopy]) -> None:
        """Carry out what `grow` asked for."""


class Scheduler:
    """The sequences of one engine; used by the sweep thread only.

    With `pages_beside` a sequence reads its prompt in one step, and every later token is a step of its own. A prompt
    that is longer than a sweep is read in one that it has to itself, once the pages are free that `pages_beside` counts
    for its tokens; until then nobody joins.

    Attributes:
        running: those that hold pages and ride every sweep, oldest first.
        waiting: those that came later or were preempted, oldest first.
        preemptions: how often one that ran was sent back.
        max_sequences: those that run side by side at most; those that do already go on where it falls.
    """

    def __init__(
        self,
        cache: Pool[Any],
        max_sequences: int,
        sweep_tokens: int,
        pages_beside: Callable[[int], int] | None = None,
    ) -> None:
        assert max_sequences <= sweep_tokens, "everyone who runs gets a token in every sweep"
        self._cache = cache
        self.max_sequences = max_sequences
        self._sweep_tokens = sweep_tokens
        self._step_tokens = sweep_tokens - max_sequences + 1  # of a prompt beside a token for everyone else
        self._pages_beside = pages_beside
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def admit(self) -> None:
        """Move waiting sequences, oldest first, to the running ones while there is room."""
        while self.waiting and self._has_room(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.table = self._cache.open_table(self._next_length(sequence))
            assert sequence.table is not None, "the engine refuses what does not fit an empty cache"
            self.running.append(sequence)

    def rides(self) -> list[Ride]:
        """Everyone's span for the next sweep, within the token budget and with pages to write to."""
        self._grow()
        counts = self._counts() if self._pages_beside is None else self._whole_counts(self._pages_beside)
        assert any(counts) or not self.running, "the engine refuses what does not fit an empty cache"
        return [
            Ride(sequence, sequence.span(count), count == sequence.pending)
            for sequence, count in zip(self.running, counts, strict=True)
            if count
        ]

    def fork(self, sequence: Sequence) -> list[Sequence]:
        """Start the samples that wait for this one's prompt, from what it has; it and they, in order.

        Where a copy is needed and there is no room for it, a sample waits and reads the prompt itself.
        """
        siblings, sequence.siblings = sequence.siblings, []
        if siblings:
            assert sequence.table is not None, "a prompt that was read is in the cache"
            for sibling in siblings:
                sibling.table = self._cache.share(sequence.table, sequence.computed)
                sibling.computed = sequence.computed if sibling.table is not None else 0
            behind = self.running.index(sequence) + 1
            self.running[behind:behind] = [sibling for sibling in siblings if sibling.table is not None]
            self.waiting.extendleft(sibling for sibling in reversed(siblings) if sibling.table is None)
        return [sequence, *siblings]

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence go, wherever it is, and free its part of the cache."""
        if sequence.table is not None:
            self._cache.release(sequence.table)
            sequence.table = None
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Send one that runs back to the head of the waiting ones; it computes again what it had.

        Of several the youngest goes first, so that they wait in the order of their age.
        """
        assert sequence.table is not None, "who runs has a table"
        self.running.remove(sequence)
        self._cache.release(sequence.table)
        sequence.table = None
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def shed(self, max_sequences: int, *, is_state_lost: bool) -> None:
        """After a sweep for which memory was short: let fewer run from now on, and send the youngest back.

        With it goes whoever cannot simply sweep again: one whose tokens were computed but not chosen from, and, where
        sequences keep states (`is_state_lost`), everyone, because a state may be half a step further.
        """
        self.max_sequences = max_sequences
        youngest = self.running[-1] if len(self.running) > 1 else None
        for sequence in self.running[::-1]:
            if sequence is youngest or is_state_lost or not sequence.pending:
                self.preempt(sequence)

    def find(self, sequence_id: str) -> list[Sequence]:
        """The live sequences of that id, one a sample; a sample that waits for the prompt is with its first one."""
        return [sequence for sequence in (*self.running, *self.waiting) if sequence.sequence_id == sequence_id]

    def _has_room(self, sequence: Sequence) -> bool:
        """True if it can run now and everyone, it included, is likely to go on for a while.

        A page to grow into for each that runs keeps newcomers from taking what would preempt them a few sweeps later.
        """
        if not self.running:
            return True
        if any(self._reads_alone(other) for other in self.running):
            return False
        places = sum(other.places for other in self.running)
        if places + sequence.places > self.max_sequences:
            return False
        growth = places + len(sequence.siblings)
        return self._cache.pages_for(sequence.length) + growth <= self._cache.free_pages

    def _grow(self) -> None:
        """Give everyone the pages it is about to write, oldest first, at the cost of the youngest."""
        copies: list[PageCopy] = []
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            assert sequence.table is not None, "who runs has a table"
            grown = self._cache.grow(sequence.table, sequence.computed, self._next_length(sequence))
            if grown is None:
                self.preempt(self._youngest())  # perhaps this one itself, never one that was served before it
            else:
                copies += grown
                index += 1
        self._cache.copy_pages(copies)

    def _youngest(self) -> Sequence:
        assert len(self.running) > 1, "the engine refuses what does not fit an empty cache"
        return self.running[-1]

    def _next_length(self, sequence: Sequence) -> int:
        """Tokens it may have computed after the next sweep."""
        if self._pages_beside is None:
            return sequence.length
        return sequence.computed + 1 if sequence.computed else sequence.first_step

    def _reads_alone(self, sequence: Sequence) -> bool:
        """True while its prompt, which must be read in one step, is yet to be and takes more than its part of one."""
        is_long = sequence.first_step > self._step_tokens
        return self._pages_beside is not None and sequence.computed == 0 and is_long

    def _whole_counts(self, pages_beside: Callable[[int], int]) -> list[int]:
        """As `_counts`, where prompts cannot be cut: who waits to read its own has none, and none overtakes it.

        The engine refuses prompts that an empty pool cannot read alone.
        """
        first = next((sequence for sequence in self.running if sequence.computed == 0), None)
        if first is not None and self._reads_alone(first) and pages_beside(first.first_step) <= self._cache.free_pages:
            return [first.first_step if sequence is first else 0 for sequence in self.running]
        counts = [int(sequence.computed > 0) for sequence in self.running]
        left = self._sweep_tokens - sum(counts)
        for index, sequence in enumerate(self.running):
            if sequence.computed:
                continue
            if sequence.first_step > left:
                break
            counts[index] = sequence.first_step
            left -= sequence.first_step
        return counts

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
