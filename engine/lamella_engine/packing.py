"""One sweep's tokens: the spans of all live sequences packed end to end, and what attention must know of them.

A span is some consecutive tokens of one sequence: one when it decodes, a chunk of its prompt when it is being read.
Spans of one token come first, shortest sequence first, so that attention can serve them in a few padded batches. All
index tensors are made here, once per sweep, on the host, and reach the device in a few copies: small operations there
cost more than what they compute. Layers only read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lamella_engine.workspace import FREE_TOKENS, MAX_GATHER_TOKENS, MAX_PADDING


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in one sweep.

    Attributes:
        token_ids: the tokens, at positions `start`, `start` + 1, ...
        start: position of the first one in its sequence.
        slots: key-value slots of the whole sequence, int64 on the host; at least ``start + len(token_ids)`` long.
    """

    token_ids: tuple[int, ...]
    start: int
    slots: torch.Tensor

    @property
    def end(self) -> int:
        """Position after the last token: the sequence's length once the span is stored."""
        return self.start + len(self.token_ids)


class DecodeGroup(Protocol):
    """One-token spans that attention serves as one batch: rows `first` to ``first + count - 1`` of the pack.

    `slots` is int64 [count, longest], padded with a slot of the same sequence.
    """

    first: int
    count: int
    slots: torch.Tensor

    def mask(self, window: int | None) -> torch.Tensor:
        """True where a span may look, bool [count, 1, 1, longest]."""

    def offsets(self) -> torch.Tensor:
        """How far behind the span's token each position lies, as a negative number, float32 [count, 1, 1, longest]."""


class Pack(Protocol):
    """What the sweep and its attention need of packed spans.

    Attributes:
        order: for each row of the logits, the index of its span in the list given.
        input_ids, position_ids: int64 [1, T].
        write_slots: int64 [T], where each token's key and value go.
        last_rows: int64 [number of spans], the row of each span's last token, in `order`.
        groups: the one-token spans in batches, from row 0 on.
        chunks: the longer spans.
    """

    order: list[int]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    write_slots: torch.Tensor
    last_rows: torch.Tensor
    groups: list[DecodeGroup]
    chunks: list[ChunkedSpan]


class ChunkedSpan:
    """A span of several tokens inside the pack, with the masks its attention needs."""

    def __init__(self, span: Span, row: int, device: torch.device) -> None:
        self.row = row
        self.count = len(span.token_ids)
        self.slots = span.slots[: span.end].to(device)
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

    def offsets(self, first: int, count: int) -> torch.Tensor:
        """How far behind the query each position lies, as a negative number: float32 [count, end].

        For `count` of the span's tokens from its token `first` on; of all at once they would outgrow the scores.
        """
        query = torch.arange(self._start + first, self._start + first + count, device=self._device)[:, None]
        return (torch.arange(self._end, device=self._device)[None] - query).float()


class PaddedGroup:
    """A `DecodeGroup` of its own tensors, for one sweep."""

    def __init__(self, spans: list[Span], first: int, device: torch.device) -> None:
        self.first = first
        self.count = len(spans)
        self._ends = torch.tensor([span.end for span in spans], device=device)
        self.slots = padded_slots(spans, max(span.end for span in spans)).to(device)
        self._masks: dict[int | None, torch.Tensor] = {}
        self._offsets: torch.Tensor | None = None

    def mask(self, window: int | None) -> torch.Tensor:
        """See `DecodeGroup`."""
        if window not in self._masks:
            self._masks[window] = decode_mask(self._ends, self.slots.shape[1], window)
        return self._masks[window]

    def offsets(self) -> torch.Tensor:
        """See `DecodeGroup`."""
        if self._offsets is None:
            self._offsets = decode_offsets(self._ends, self.slots.shape[1])
        return self._offsets


class PackedSweep:
    """Spans of many sequences as one ``[1, T]`` input; a `Pack` for one sweep.

    Keys and values of at most `gather_tokens` tokens are brought together for one batch, unless one sequence has more.
    """

    def __init__(self, spans: list[Span], device: torch.device, gather_tokens: int = MAX_GATHER_TOKENS) -> None:
        self.order = sorted(range(len(spans)), key=lambda index: _place(spans[index]))
        ordered = [spans[index] for index in self.order]
        singles = [span for span in ordered if len(span.token_ids) == 1]
        self.groups: list[DecodeGroup] = _groups(singles, device, gather_tokens)
        ids = [token for span in ordered for token in span.token_ids]
        positions = [position for span in ordered for position in range(span.start, span.end)]
        self.input_ids = torch.tensor([ids], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.write_slots = torch.cat([span.slots[span.start : span.end] for span in ordered]).to(device)
        self.chunks: list[ChunkedSpan] = []
        row, last_rows = 0, []
        for span in ordered:
            if len(span.token_ids) > 1:
                self.chunks.append(ChunkedSpan(span, row, device))
            row += len(span.token_ids)
            last_rows.append(row - 1)
        self.last_rows = torch.tensor(last_rows, device=device)


def padded_slots(spans: list[Span], longest: int) -> torch.Tensor:
    """Slots of each span's sequence up to its end, int64 [n, longest] on the host, padded with its own first slot.

    A mask hides what lies in padding unless that is not a number, and then it is the sequence's own.
    """
    slots = torch.stack([span.slots[0] for span in spans])[:, None].repeat(1, longest)
    for row, span in zip(slots.unbind(), spans, strict=True):
        row[: span.end] = span.slots[: span.end]
    return slots


def decode_mask(ends: torch.Tensor, longest: int, window: int | None) -> torch.Tensor:
    """Where one-token spans of sequences of `ends` tokens ([n]) may look, bool [n, 1, 1, longest]."""
    key = torch.arange(longest, device=ends.device)[None]
    mask = key < ends[:, None]
    if window is not None:
        mask &= key >= ends[:, None] - window
    return mask[:, None, None, :]


def decode_offsets(ends: torch.Tensor, longest: int) -> torch.Tensor:
    """Each position less that of the last token, for sequences of `ends` tokens ([n]), float32 [n, 1, 1, longest]."""
    key = torch.arange(longest, device=ends.device)[None]
    return (key - ends[:, None] + 1).float()[:, None, None, :]


def _place(span: Span) -> tuple[int, int]:
    return (0, span.end) if len(span.token_ids) == 1 else (1, 0)


def _groups(singles: list[Span], device: torch.device, gather_tokens: int) -> list[DecodeGroup]:
    """Batches of neighbours in length, none of them mostly padding or larger than the room for gathered keys."""
    groups: list[DecodeGroup] = []
    first = 0
    for index, span in enumerate(singles):
        shortest = max(singles[first].end, FREE_TOKENS)
        is_uneven = span.end > MAX_PADDING * shortest
        is_large = (index + 1 - first) * span.end > gather_tokens
        if index > first and (is_uneven or is_large):
            groups.append(PaddedGroup(singles[first:index], first, device))
            first = index
    if singles:
        groups.append(PaddedGroup(singles[first:], first, device))
    return groups
