"""CUDA graphs of decoding layers: where shapes repeat, a layer's launches are recorded once and replayed in one call.

Owns buckets (number of sequences, longest context), each with a pack whose tensors stay where they are and are filled
anew for every sweep, and the recorded graph of each (layer, buffer) pair. A layer that cannot be recorded switches
graphs off for good; the sweep then launches its kernels one by one, with the same result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lamella_engine.packing import (
    FREE_TOKENS,
    GATHER_TOKENS,
    MAX_PADDING,
    ChunkedSpan,
    DecodeGroup,
    Span,
    decode_mask,
    padded_slots,
)

logger = logging.getLogger(__name__)

WARM_SWEEPS = 3  # a bucket is recorded when it comes for the third time in a row
MAX_GRAPHS = 1024  # recorded at most; each takes memory of the driver
_SEQUENCE_STEP = 8
_CONTEXT_STEP = 64

Body = Callable[..., Any]
Key = tuple[int, tuple[str, int]]


def bucket_of(spans: list[Span]) -> tuple[int, int] | None:
    """Number of sequences and longest context of the bucket that `spans` fall in; None if they are no plain decode."""
    if not spans or any(len(span.token_ids) > 1 for span in spans):
        return None
    ends = [span.end for span in spans]
    count = _next_size(len(spans), _SEQUENCE_STEP)
    longest = _CONTEXT_STEP * _next_size(-(-max(ends) // _CONTEXT_STEP), 4)
    if longest > MAX_PADDING * max(min(ends), FREE_TOKENS) or count * longest > GATHER_TOKENS:
        return None
    return count, longest


def _next_size(value: int, step: int) -> int:
    """The next power of two up to `step`, above it the next quarter of a power of two."""
    if value <= step:
        return 1 << (value - 1).bit_length()
    unit = (1 << ((value - 1).bit_length() - 1)) // 4
    return -(-value // unit) * unit


class _StaticGroup:
    """The one decode group of a bucket; see `packing.DecodeGroup`."""

    def __init__(self, count: int, longest: int, device: torch.device) -> None:
        self.first = 0
        self.count = count
        self.slots = torch.zeros(count, longest, dtype=torch.int64, device=device)
        self._ends = torch.ones(count, dtype=torch.int64, device=device)
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None) -> torch.Tensor:
        """See `packing.DecodeGroup`; made when a window is first asked for, filled anew by `fill`."""
        if window not in self._masks:
            self._masks[window] = decode_mask(self._ends, self.slots.shape[1], window)
        return self._masks[window]

    def fill(self, spans: list[Span], ends: torch.Tensor) -> None:
        """Take over the slots and lengths of as many spans as the group has rows."""
        held = padded_slots(spans, ends)
        longest = self.slots.shape[1]
        self.slots.copy_(held[:, :1].expand(-1, longest))
        self.slots[:, : held.shape[1]].copy_(held)
        self._ends.copy_(ends)
        for window, mask in self._masks.items():
            mask.copy_(decode_mask(self._ends, longest, window))


class DecodePack:
    """A `packing.Pack` of fixed shape; rows beyond the spans repeat the first one, which does no harm."""

    def __init__(self, count: int, longest: int, windows: tuple[int | None, ...], device: torch.device) -> None:
        self._device = device
        self._count = count
        self._numbers = torch.zeros(4, count, dtype=torch.int64, device=device)
        self._group = _StaticGroup(count, longest, device)
        for window in set(windows):
            self._group.mask(window)
        self.groups: list[DecodeGroup] = [self._group]
        self.chunks: list[ChunkedSpan] = []
        self.order: list[int] = []
        self.input_ids, self.position_ids = self._numbers[0][None], self._numbers[1][None]
        self.write_slots = self._numbers[2]
        self.last_rows = torch.zeros(0, dtype=torch.int64, device=device)

    def fill(self, spans: list[Span]) -> None:
        """Take over the spans of a sweep."""
        rows = spans + [spans[0]] * (self._count - len(spans))
        write = torch.stack([span.slots[span.start] for span in rows])
        numbers = torch.tensor(
            [[span.token_ids[0] for span in rows], [span.start for span in rows], [span.end for span in rows]]
        )
        self._numbers[[0, 1, 3]] = numbers.to(self._device)
        self._numbers[2] = write
        self._group.fill(rows, self._numbers[3])
        self.order = list(range(len(spans)))
        self.last_rows = torch.arange(len(spans), device=self._device)


@dataclass(frozen=True)
class _Recorded:
    """A layer's graph: what it reads besides the hidden states, and the shape of its call."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor | None, ...]  # by leaf; None where the leaf is no tensor
    constants: tuple[object, ...]
    result: Any


class DecodeBucket:
    """A pack of fixed shape and the graphs recorded for it."""

    def __init__(self, pack: DecodePack, owner: LayerGraphs) -> None:
        self.pack = pack
        self.num_sweeps = 0
        self._owner = owner
        self._recorded: dict[Key, _Recorded] = {}
        self._hidden: torch.Tensor | None = None
        self._held: dict[int, torch.Tensor] = {}  # by the address of a static input, what was copied to it last
        self._statics: dict[int, torch.Tensor] = {}  # by the id of a tensor of this sweep, its static input

    @property
    def num_graphs(self) -> int:
        """Graphs recorded."""
        return len(self._recorded)

    def begin_sweep(self) -> None:
        """Forget which tensors belonged to the last sweep."""
        self._held.clear()
        self._statics.clear()

    def run(self, key: Key, body: Body, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``body(*args, **kwargs)`` as a graph; the result is valid until the next layer runs."""
        leaves, form = pytree.tree_flatten((args, kwargs))
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._record(body, leaves, form)
            self._recorded[key] = recorded
        constants = tuple(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor))
        if constants != recorded.constants:
            return body(*args, **kwargs)
        for leaf, static in zip(leaves, recorded.inputs, strict=True):
            if static is not None:
                self._statics.setdefault(id(leaf), static)
                self._bring(leaf, static)
        recorded.graph.replay()
        return recorded.result

    def _bring(self, leaf: torch.Tensor, static: torch.Tensor) -> None:
        address = static.data_ptr()
        if leaf is static or self._held.get(address) is leaf:
            return
        static.copy_(leaf)
        self._held[address] = leaf

    def _record(self, body: Body, leaves: list[Any], form: Any) -> _Recorded:
        first = next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        if self._hidden is None:
            self._hidden = torch.empty_like(first)
        inputs: list[torch.Tensor | None] = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                inputs.append(None)
            elif leaf is first:
                inputs.append(self._hidden)
            else:
                inputs.append(self._statics.setdefault(id(leaf), torch.empty_like(leaf)))
        for leaf, static in zip(leaves, inputs, strict=True):
            if static is not None:
                self._bring(leaf, static)
        fixed = [leaf if static is None else static for leaf, static in zip(leaves, inputs, strict=True)]
        args, kwargs = pytree.tree_unflatten(fixed, form)
        graph, result = self._owner.record(body, args, kwargs, self._hidden)
        constants = tuple(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor))
        return _Recorded(graph, tuple(inputs), constants, result)


class LayerGraphs:
    """All buckets of one engine; used by the sweep thread only."""

    def __init__(self, device: torch.device, windows: tuple[int | None, ...]) -> None:
        self._device = device
        self._windows = windows
        self.is_enabled = device.type == "cuda"
        self._buckets: dict[tuple[int, int], DecodeBucket] = {}
        self._last: tuple[int, int] | None = None
        self._repeats = 0
        if self.is_enabled:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch leaves it without types
            self._pool = torch.cuda.graph_pool_handle()

    def bucket(self, spans: list[Span]) -> DecodeBucket | None:
        """The bucket to run `spans` in, its pack filled; None where they should be launched one by one."""
        shape = bucket_of(spans) if self.is_enabled else None
        self._repeats = self._repeats + 1 if shape is not None and shape == self._last else 0
        self._last = shape
        if shape is None or (shape not in self._buckets and self._repeats < WARM_SWEEPS - 1):
            return None
        if shape not in self._buckets:
            self._make_room()
            pack = DecodePack(*shape, self._windows, self._device)
            self._buckets[shape] = DecodeBucket(pack, self)
        bucket = self._buckets[shape] = self._buckets.pop(shape)  # the one used last comes last
        bucket.pack.fill(spans)
        bucket.begin_sweep()
        return bucket

    def disable(self, reason: BaseException) -> None:
        """Launch kernels one by one from now on."""
        logger.warning("layers of this model cannot be recorded as CUDA graphs, they run without: %s", reason)
        self.is_enabled = False
        self._buckets.clear()

    def close(self) -> None:
        """Free every graph."""
        self._buckets.clear()

    def record(self, body: Body, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor) -> Any:
        """Record ``body(*args, **kwargs)`` with its hidden states written back to `hidden`; returns (graph, result)."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = _write_back(body(*args, **kwargs), hidden)
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph, result

    def _make_room(self) -> None:
        while self._buckets and sum(bucket.num_graphs for bucket in self._buckets.values()) >= MAX_GRAPHS:
            torch.cuda.synchronize(self._device)
            del self._buckets[next(iter(self._buckets))]


def _write_back(result: Any, hidden: torch.Tensor) -> Any:
    """The layer's result with its hidden states in `hidden`, which the next layer reads."""
    if isinstance(result, torch.Tensor):
        hidden.copy_(result)
        return hidden
    if isinstance(result, tuple) and not any(isinstance(part, torch.Tensor) for part in result[1:]):
        hidden.copy_(result[0])
        return (hidden, *result[1:])
    raise TypeError(f"a layer returned {type(result).__name__} with more than hidden states")
