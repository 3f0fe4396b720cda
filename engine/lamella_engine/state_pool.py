"""The states of all live sequences on the stepwise path, and the pages that account for them.

Owns the arithmetic from a state's size to pages: the memory is allocated by transformers' own cache objects, and a
sequence runs only while it holds pages for as much as those may take. Samples of one prompt each get a copy. The
`scheduler` asks and decides, as it does with `kv_cache` on the packed path.
"""

from __future__ import annotations

from collections.abc import Callable

from lamella_engine.kv_cache import PAGE_TOKENS, PageCopy
from lamella_engine.sequence_state import SequenceState
from lamella_engine.state_size import StateSize
from lamella_engine.stepwise import StepSpan

_STATE_TOKENS = 256  # what does not grow with a sequence counts as no more tokens than these
_NO_LIMIT = 1 << 40  # tokens
_STATE_SHARE = 8  # and as no more than this part of a context


def unit_bytes(size: StateSize, context_tokens: int) -> int:
    """Bytes that the plan counts for a token: what one adds, or more where a sequence's fixed part is large.

    So the room for one sequence of a useful length always holds its fixed part as well.
    """
    fixed_tokens = max(1, min(_STATE_TOKENS, context_tokens // _STATE_SHARE))
    return max(1, size.token_bytes, -(-size.sequence_bytes // fixed_tokens))


class StateTable:
    """The pages of one sequence, changed by `StatePool` only, and its state."""

    def __init__(self, pages: int, state: SequenceState) -> None:
        self.pages = pages
        self.state = state

    def span(self, token_ids: tuple[int, ...], start: int) -> StepSpan:
        """A step of these tokens, which come behind `start` others."""
        return StepSpan(token_ids, start, self.state)


def _nothing_more(tokens: int) -> int:
    """Any step is within the workspace."""
    return 0


class StatePool:
    """Pages for `capacity_tokens` tokens of `token_bytes` bytes; not thread-safe, owned by the sweep thread.

    A step that is alone in its sweep may be larger than a sweep is planned to be: what it computes with beyond the
    workspace, `step_bytes` bytes for so many tokens, fits where pages are free, as free pages have no memory.
    """

    def __init__(
        self, capacity_tokens: int, size: StateSize, token_bytes: int, step_bytes: Callable[[int], int] = _nothing_more
    ) -> None:
        self._size = size
        self._step_bytes = step_bytes
        self._page_bytes = PAGE_TOKENS * token_bytes
        self._num_pages = capacity_tokens // PAGE_TOKENS
        self._free_pages = self._num_pages
        self._tables: list[StateTable] = []

    @property
    def longest(self) -> int:
        """Tokens that one sequence may have, if it is alone; 0 if not even its fixed part fits."""
        room = self._num_pages * self._page_bytes - self._size.sequence_bytes
        if self._size.token_bytes == 0:
            return _NO_LIMIT if room >= 0 else 0
        return max(0, room // self._size.token_bytes)

    @property
    def num_pages(self) -> int:
        """Pages of the whole pool."""
        return self._num_pages

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return self._free_pages

    @property
    def nbytes(self) -> int:
        """Bytes that the states take now."""
        return sum(table.state.nbytes for table in self._tables)

    @property
    def accounted_bytes(self) -> int:
        """Bytes that the pages in use stand for."""
        return (self._num_pages - self._free_pages) * self._page_bytes

    def pages_for(self, tokens: int) -> int:
        """Pages that stand for a sequence of `tokens` tokens."""
        return -(-(self._size.sequence_bytes + tokens * self._size.token_bytes) // self._page_bytes)

    def pages_beside(self, tokens: int) -> int:
        """Pages that must be free beside its own for a step of `tokens` tokens, alone in its sweep."""
        return -(-self._step_bytes(tokens) // self._page_bytes)

    def capacity_for(self, tokens: int) -> int:
        """Tokens of capacity with which a prompt of `tokens` tokens could be read in one step, alone in its sweep."""
        return (self.pages_for(tokens + 1) + self.pages_beside(tokens)) * PAGE_TOKENS

    def longest_step(self, limit: int) -> int:
        """Tokens, up to `limit`, of the longest prompt that can be read in one step, alone in its sweep."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.capacity_for(middle) <= self._num_pages * PAGE_TOKENS
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def open_table(self, tokens: int) -> StateTable | None:
        """An empty state with pages for `tokens` tokens; None, and nothing taken, if the pool is short."""
        return self._open(tokens, SequenceState())

    def grow(self, table: StateTable, start: int, end: int) -> list[PageCopy] | None:
        """Let the state of `table` grow to `end` tokens; None, and nothing changed, if the pool is short."""
        more = max(0, self.pages_for(end) - table.pages)
        if more > self._free_pages:
            return None
        self._free_pages -= more
        table.pages += more
        return []

    def share(self, table: StateTable, computed: int) -> StateTable | None:
        """A copy of the state, which has `computed` tokens; None, and nothing taken, if the pool is short."""
        twin = self._open(computed, SequenceState())
        if twin is not None:
            twin.state = table.state.copy()
        return twin

    def release(self, table: StateTable) -> None:
        """Drop the state of `table` and free its pages."""
        self._free_pages += table.pages
        table.pages = 0
        table.state = SequenceState()
        self._tables = [other for other in self._tables if other is not table]

    def copy_pages(self, copies: list[PageCopy]) -> None:
        """Nothing to do: no two sequences hold a page together."""
        assert not copies, "`grow` asks for none"

    def close(self) -> None:
        """Drop every state. Idempotent."""
        for table in list(self._tables):
            self.release(table)

    def _open(self, tokens: int, state: SequenceState) -> StateTable | None:
        pages = self.pages_for(tokens)
        if pages > self._free_pages:
            return None
        self._free_pages -= pages
        table = StateTable(pages, state)
        self._tables.append(table)
        return table
