"""Keys and values of all live sequences, in pages, one pool per layer.

Owns which pages belong to which sequence and the tensors behind them. A sequence reserves all it may ever need when it
is admitted, so a running sequence never runs out. Slots are flat token positions in the pool: token `i` of a sequence
lives at ``slots[i]`` in every layer. Shapes are taken from the first tensors a layer stores, so heads may differ
between layers and keys may be wider than values.
"""

from __future__ import annotations

import torch

PAGE_TOKENS = 16


class KVCache:
    """A pool of `capacity_tokens` (rounded down to pages) on `device`; not thread-safe, owned by the sweep thread."""

    def __init__(self, capacity_tokens: int, device: torch.device) -> None:
        self._device = device
        self._num_pages = capacity_tokens // PAGE_TOKENS
        self._free_pages = list(range(self._num_pages - 1, -1, -1))
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    @property
    def capacity_tokens(self) -> int:
        """Tokens the whole pool holds."""
        return self._num_pages * PAGE_TOKENS

    @property
    def free_tokens(self) -> int:
        """Tokens in pages that no sequence has reserved."""
        return len(self._free_pages) * PAGE_TOKENS

    def reserve(self, tokens: int) -> torch.Tensor | None:
        """Slots for `tokens` positions, int64 [pages * PAGE_TOKENS] on the device; None if the pool is short."""
        pages = -(-tokens // PAGE_TOKENS)
        if pages > len(self._free_pages):
            return None
        taken = torch.tensor([self._free_pages.pop() for _ in range(pages)], dtype=torch.int64)
        slots = taken[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
        return slots.reshape(-1).to(self._device)

    def release(self, slots: torch.Tensor) -> None:
        """Return what `reserve` gave."""
        self._free_pages.extend((slots[::PAGE_TOKENS] // PAGE_TOKENS).tolist())

    def store(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write `keys` [T, heads, key width] and `values` [T, heads, value width] at `slots` [T]."""
        if layer not in self._keys:
            self._keys[layer] = keys.new_empty((self.capacity_tokens, *keys.shape[1:]))
            self._values[layer] = values.new_empty((self.capacity_tokens, *values.shape[1:]))
        self._keys[layer].index_copy_(0, slots, keys)
        self._values[layer].index_copy_(0, slots, values)

    def load(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at `slots` [...], each of shape [..., heads, width]."""
        return self._keys[layer][slots], self._values[layer][slots]
