"""Keys and values of all live sequences, in pages, one pool per layer.

Owns the pages: which are free, how many sequences hold each, and the tensors behind them. A sequence's `PageTable`
grows with it, between sweeps only; samples of one prompt hold its pages together, and the page in which they part is
copied before any of them writes there. Who gets a page when they run short is the `scheduler`'s choice. Slots are flat
token positions in the pool: token `i` of a sequence lives at ``slots[i]`` in every layer; `attention` stores and loads
there. Shapes are taken from the first tensors a layer stores, so heads may differ between layers and keys may be wider
than values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lamella_engine.packing import Span

PAGE_TOKENS = 16


class PageCopy(NamedTuple):
    """A page whose keys and values are to be copied to another, in all layers."""

    source: int
    target: int


class PageTable:
    """The pages of one sequence in order, changed by `KVCache` only: token `i` is in ``pages[i // PAGE_TOKENS]``."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self._slots = torch.empty(0, dtype=torch.int64)
        self._written = 0  # pages whose slots are written

    @property
    def slots(self) -> torch.Tensor:
        """Slots of all its tokens, int64 [pages * PAGE_TOKENS] on the host; good until the table changes."""
        total = len(self.pages) * PAGE_TOKENS
        done = self._written * PAGE_TOKENS
        if done < total:
            if total > len(self._slots):
                wider = torch.empty(max(total, 2 * len(self._slots)), dtype=torch.int64)
                wider[:done] = self._slots[:done]
                self._slots = wider
            new = torch.tensor(self.pages[self._written :], dtype=torch.int64)
            self._slots[done:total] = (new[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).reshape(-1)
            self._written = len(self.pages)
        return self._slots[:total]

    def span(self, token_ids: tuple[int, ...], start: int) -> Span:
        """These tokens, which come behind `start` others, and where their keys and values go."""
        return Span(token_ids, start, self.slots)

    def replace(self, index: int, page: int) -> None:
        """Hold `page` in place of the one at `index`."""
        self.pages[index] = page
        self._written = min(self._written, index)


class KVCache:
    """A pool of `capacity_tokens` (rounded down to pages) on `device`; not thread-safe, owned by the sweep thread."""

    def __init__(self, capacity_tokens: int, device: torch.device) -> None:
        self._device = device
        self._num_pages = capacity_tokens // PAGE_TOKENS
        self._free_pages = list(range(self._num_pages - 1, -1, -1))
        self._holders = [0] * self._num_pages
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    @property
    def capacity_tokens(self) -> int:
        """Tokens the whole pool holds."""
        return self._num_pages * PAGE_TOKENS

    @property
    def longest(self) -> int:
        """Tokens that one sequence may have, if it is alone."""
        return self.capacity_tokens

    @property
    def free_tokens(self) -> int:
        """Tokens in pages that no sequence holds."""
        return len(self._free_pages) * PAGE_TOKENS

    @property
    def num_pages(self) -> int:
        """Pages of the whole pool."""
        return self._num_pages

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free_pages)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors so far; all there will be once every layer has stored something."""
        return sum(tensor.nbytes for pool in (self._keys, self._values) for tensor in pool.values())

    def pages_for(self, tokens: int) -> int:
        """Pages that hold a sequence of `tokens` tokens."""
        return pages_for(tokens)

    def open_table(self, tokens: int) -> PageTable | None:
        """A table with pages for `tokens` positions; None, and nothing taken, if the pool is short."""
        table = PageTable()
        return None if self.grow(table, 0, tokens) is None else table

    def grow(self, table: PageTable, start: int, end: int) -> list[PageCopy] | None:
        """Make positions `start` to `end` (exclusive) of `table` its own to write; all before `start` are computed.

        Returns:
            What must be copied, by `copy_pages`, before the next sweep writes; None, and nothing changed, if the pool
            is short.
        """
        missing = max(0, pages_for(end) - len(table.pages))
        parting = start // PAGE_TOKENS  # pages are shared up to what was computed: at most this one is written to
        is_shared = parting < len(table.pages) and self._holders[table.pages[parting]] > 1
        if missing + is_shared > len(self._free_pages):
            return None
        copies = []
        if is_shared:
            shared = table.pages[parting]
            table.replace(parting, self._take())
            if start % PAGE_TOKENS:
                copies.append(PageCopy(shared, table.pages[parting]))
            self._holders[shared] -= 1
        table.pages.extend(self._take() for _ in range(missing))
        return copies

    def share(self, table: PageTable, computed: int) -> PageTable:
        """Another table that holds the pages of the first `computed` positions, for one that goes on from there."""
        twin = PageTable()
        twin.pages = table.pages[: pages_for(computed)]
        for page in twin.pages:
            self._holders[page] += 1
        return twin

    def release(self, table: PageTable) -> None:
        """Let go of all pages of `table`, which is empty then; those that nobody else holds are free."""
        for page in reversed(table.pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free_pages.append(page)
        table.pages = []

    def copy_pages(self, copies: list[PageCopy]) -> None:
        """Carry out `copies` in every layer; a page may be the source of one and the target of another."""
        if not copies or not self._keys:
            return
        sources, targets = torch.tensor(copies, device=self._device).T
        with torch.inference_mode():  # the pools are made within a sweep
            for pool in (*self._keys.values(), *self._values.values()):
                pages = pool.view(self._num_pages, PAGE_TOKENS, *pool.shape[1:])
                pages.index_copy_(0, targets, pages.index_select(0, sources))

    def store(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write `keys` [T, heads, key width] and `values` [T, heads, value width] at `slots` [T]."""
        if layer not in self._keys:
            self._keys[layer] = self._pool(keys)
            self._values[layer] = self._pool(values)
        self._keys[layer].index_copy_(0, slots, keys)
        self._values[layer].index_copy_(0, slots, values)

    def load(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at `slots` [...], each of shape [..., heads, width]."""
        return self._keys[layer][slots], self._values[layer][slots]

    def close(self) -> None:
        """Give the pools back; nothing can be stored then. Idempotent."""
        self._keys.clear()
        self._values.clear()

    def _take(self) -> int:
        page = self._free_pages.pop()
        self._holders[page] = 1
        return page

    def _pool(self, like: torch.Tensor) -> torch.Tensor:
        pool = like.new_empty((self.capacity_tokens, *like.shape[1:]))
        pool[:1] = 0  # batches are padded with slot 0: masked, but a NaN there would get through
        return pool


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` positions."""
    return -(-tokens // PAGE_TOKENS)
