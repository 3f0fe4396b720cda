"""One sweep's tokens: the spans of all live sequences packed end to end, and what attention must know of them.

A span is some consecutive tokens of one sequence: one when it decodes, a chunk of its prompt when it is being read.
Spans of one token come first, so that attention can serve them as one batch. All index tensors are made here, once per
sweep; layers only read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in one sweep.

    Attributes:
        token_ids: the tokens, at positions `start`, `start` + 1, ...
        start: position of the first one in its sequence.
        slots: key-value slots of the whole sequence, int64 on the device; at least ``start + len(token_ids)`` long.
    """

    token_ids: tuple[int, ...]
    start: int
    slots: torch.Tensor

    @property
    def end(self) -> int:
        """Position after the last token: the sequence's length once the span is stored."""
        return self.start + len(self.token_ids)


class ChunkedSpan:
    """A span of several tokens inside the pack, with the masks its attention needs."""

    def __init__(self, span: Span, row: int, device: torch.device) -> None:
        self.row = row
        self.count = len(span.token_ids)
        self.slots = span.slots[: span.end]
        self._start = span.start
        self._end = span.end
        self._device = device
        self._masks: dict[int | None, torch.Tensor] = {}

    def is_plain_causal(self, window: int | None) -> bool:
        """True if ``is_causal`` says it all: the span starts its sequence and no window cuts it."""
        return self._start == 0 and (window is None or window >= self._end)

    def mask(self, window: int | None) -> torch.Tensor:
        """True where a query may look, bool [count, end]."""
        mask = self._masks.get(window)
        if mask is None:
            query = torch.arange(self._start, self._end, device=self._device)[:, None]
            key = torch.arange(self._end, device=self._device)[None]
            mask = key <= query
            if window is not None:
                mask &= key > query - window
            self._masks[window] = mask
        return mask


class PackedSweep:
    """Spans of many sequences as one ``[1, T]`` input.

    Attributes:
        order: for each row group, the index of its span in the list given (one-token spans first).
        input_ids, position_ids: int64 [1, T].
        write_slots: int64 [T], where each token's key and value go.
        last_rows: int64 [number of spans], the row of each span's last token, in `order`.
        num_single: spans of one token; they are rows 0 to num_single - 1.
        chunks: the longer spans.
    """

    def __init__(self, spans: list[Span], device: torch.device) -> None:
        self._device = device
        self.order = sorted(range(len(spans)), key=lambda index: len(spans[index].token_ids) > 1)
        ordered = [spans[index] for index in self.order]
        self._singles = [span for span in ordered if len(span.token_ids) == 1]
        self.num_single = len(self._singles)
        ids = [token for span in ordered for token in span.token_ids]
        positions = [position for span in ordered for position in range(span.start, span.end)]
        self.input_ids = torch.tensor([ids], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.write_slots = torch.cat([span.slots[span.start : span.end] for span in ordered])
        self.chunks: list[ChunkedSpan] = []
        row, last_rows = 0, []
        for span in ordered:
            if len(span.token_ids) > 1:
                self.chunks.append(ChunkedSpan(span, row, device))
            row += len(span.token_ids)
            last_rows.append(row - 1)
        self.last_rows = torch.tensor(last_rows, device=device)
        self._single_masks: dict[int | None, torch.Tensor] = {}

    @cached_property
    def single_slots(self) -> torch.Tensor:
        """Slots of the one-token spans' sequences, int64 [num_single, longest], padded with slot 0."""
        return torch.nn.utils.rnn.pad_sequence([span.slots[: span.end] for span in self._singles], batch_first=True)

    def single_mask(self, window: int | None) -> torch.Tensor:
        """True where a one-token span may look, bool [num_single, 1, 1, longest]."""
        mask = self._single_masks.get(window)
        if mask is None:
            ends = torch.tensor([span.end for span in self._singles], device=self._device)[:, None]
            key = torch.arange(self.single_slots.shape[1], device=self._device)[None]
            mask = key < ends
            if window is not None:
                mask &= key >= ends - window
            mask = self._single_masks[window] = mask[:, None, None, :]
        return mask
