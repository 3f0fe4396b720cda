"""Graphs of decoding layers: where shapes repeat, a layer's launches are recorded once and replayed in one call.

Owns buckets (number of sequences, longest context), each with a pack whose tensors stay where they are and are filled
anew for every sweep, and the recorded graph of each (layer, buffer) pair. `graph_recorder` does the recording. A layer
that cannot be recorded switches graphs off for good; the sweep then launches its kernels one by one, with the same
result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lamella_engine.graph_recorder import Recorder, Replay
from lamella_engine.packing import ChunkedSpan, DecodeGroup, Span, decode_mask, decode_offsets, padded_slots
from lamella_engine.workspace import FREE_TOKENS, MAX_BUCKETS, MAX_PADDING, bucket_size

logger = logging.getLogger(__name__)

WARM_SWEEPS = 3  # a bucket is recorded when it comes for the third time in a row; the time before, it runs unrecorded
MAX_GRAPHS = 1024  # recorded at most; each takes memory of the driver
_CONTEXT_STEP = 64

Body = Callable[..., Any]
Key = tuple[int, tuple[str, int]]


class RecordError(Exception):
    """A layer's launches cannot be recorded; nothing of it has run."""


def bucket_of(spans: list[Span], gather_tokens: int) -> tuple[int, int] | None:
    """Number of sequences and longest context of the bucket that `spans` fall in; None if they are no plain decode.

    Neither are those that need more than one batch: of `gather_tokens` keys and values, not mostly padding.
    """
    if not spans or any(len(span.token_ids) > 1 for span in spans):
        return None
    ends = [span.end for span in spans]
    count = bucket_size(len(spans))
    longest = _CONTEXT_STEP * bucket_size(-(-max(ends) // _CONTEXT_STEP), 4)
    if longest > MAX_PADDING * max(min(ends), FREE_TOKENS) or count * longest > gather_tokens:
        return None
    return count, longest


class _StaticGroup:
    """The one decode group of a bucket; see `packing.DecodeGroup`."""

    def __init__(self, count: int, longest: int, device: torch.device) -> None:
        self.first = 0
        self.count = count
        self.slots = torch.zeros(count, longest, dtype=torch.int64, device=device)
        self._ends = torch.ones(count, dtype=torch.int64, device=device)
        self._masks: dict[int | None, torch.Tensor] = {}
        self._offsets: torch.Tensor | None = None

    def mask(self, window: int | None) -> torch.Tensor:
        """See `packing.DecodeGroup`; made when a window is first asked for, filled anew by `fill`."""
        if window not in self._masks:
            self._masks[window] = decode_mask(self._ends, self.slots.shape[1], window)
        return self._masks[window]

    def offsets(self) -> torch.Tensor:
        """See `packing.DecodeGroup`; made when first asked for, filled anew by `fill`."""
        if self._offsets is None:
            self._offsets = decode_offsets(self._ends, self.slots.shape[1])
        return self._offsets

    def fill(self, spans: list[Span], ends: torch.Tensor) -> None:
        """Take over the slots and lengths (`ends`, on the device) of as many spans as the group has rows."""
        longest = self.slots.shape[1]
        self.slots.copy_(padded_slots(spans, longest))
        self._ends.copy_(ends)
        for window, mask in self._masks.items():
            mask.copy_(decode_mask(self._ends, longest, window))
        if self._offsets is not None:
            self._offsets.copy_(decode_offsets(self._ends, longest))


class DecodePack:
    """A `packing.Pack` of fixed shape; rows beyond the spans repeat the first one, which does no harm."""

    def __init__(self, count: int, longest: int, device: torch.device) -> None:
        self._device = device
        self._count = count
        self._numbers = torch.zeros(4, count, dtype=torch.int64, device=device)
        self._group = _StaticGroup(count, longest, device)
        self.groups: list[DecodeGroup] = [self._group]
        self.chunks: list[ChunkedSpan] = []
        self.order: list[int] = []
        self.input_ids, self.position_ids = self._numbers[0][None], self._numbers[1][None]
        self.write_slots = self._numbers[2]
        self.last_rows = torch.zeros(0, dtype=torch.int64, device=device)

    def fill(self, spans: list[Span]) -> None:
        """Take over the spans of a sweep."""
        rows = spans + [spans[0]] * (self._count - len(spans))
        numbers = [(span.token_ids[0], span.start, int(span.slots[span.start]), span.end) for span in rows]
        self._numbers.copy_(torch.tensor(numbers).T)
        self._group.fill(rows, self._numbers[3])
        self.order = list(range(len(spans)))
        self.last_rows = torch.arange(len(spans), device=self._device)


def flatten(value: Any, leaves: list[Any]) -> object:
    """Append what lies in nested tuples, lists and dicts to `leaves`; returns their form, which `rebuild` takes.

    Called for every layer of every sweep: torch's own, which knows more kinds of trees, takes ten times as long.
    """
    kind = type(value)
    if kind is tuple or kind is list:
        return (kind, [flatten(part, leaves) for part in value])
    if kind is dict:
        return (tuple(value), [flatten(part, leaves) for part in value.values()])
    leaves.append(value)
    return None


def rebuild(form: Any, leaves: Iterator[Any]) -> Any:
    """The value that `flatten` took apart, with other leaves."""
    if form is None:
        return next(leaves)
    kind, parts = form
    values = [rebuild(part, leaves) for part in parts]
    return kind(values) if isinstance(kind, type) else dict(zip(kind, values, strict=True))


@dataclass(frozen=True)
class _Recorded:
    """A layer's graph: what it reads besides the hidden states, and the shape of its call."""

    replay: Replay
    form: object
    inputs: tuple[tuple[int, torch.Tensor] | None, ...]  # by leaf, with its address; None where the leaf is no tensor
    constants: tuple[object, ...]  # by leaf; None where the leaf is a tensor
    result: Any


class DecodeBucket:
    """A pack of fixed shape and the graphs recorded for it; used within inference mode."""

    def __init__(self, pack: DecodePack, device: torch.device, recorder: Recorder) -> None:
        self.pack = pack
        self._device = device
        self._recorder = recorder
        self._num_sweeps = 0
        self._recorded: dict[Key, _Recorded] = {}
        self._hidden: torch.Tensor | None = None
        self._held: dict[int, torch.Tensor] = {}  # by the address of a static input, what was copied to it last
        # By its id a tensor of this sweep, held so that no other gets the id, and its static input.
        self._statics: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_graphs(self) -> int:
        """Graphs recorded."""
        return len(self._recorded)

    def begin_sweep(self, spans: list[Span]) -> None:
        """Take over the spans, and forget which tensors belonged to the last sweep."""
        self.pack.fill(spans)
        self._num_sweeps += 1
        self._held.clear()
        self._statics.clear()

    def run(self, key: Key, body: Body, args: tuple[Any, ...], kwargs: Mapping[str, object]) -> Any:
        """Run ``body(*args, **kwargs)`` as a graph; the result is valid until the next layer runs.

        The bucket's first sweep runs it as it is: what kernels, libraries and masks set up when they first meet a shape
        must not be recorded.

        Raises:
            RecordError: the body cannot be recorded; it has not run.
        """
        if self._num_sweeps == 1:
            return body(*args, **kwargs)
        leaves: list[Any] = []
        form = flatten((args, dict(kwargs)), leaves)
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._recorded[key] = self._record(body, leaves, form)
        elif not self._bring_all(leaves, form, recorded):
            return body(*args, **kwargs)
        recorded.replay()
        assert self._hidden is not None, "every graph writes to it"
        self._held[self._hidden.data_ptr()] = self._hidden
        return recorded.result

    def _bring_all(self, leaves: list[Any], form: object, recorded: _Recorded) -> bool:
        """Make the inputs of a recording those of this call; False if the call would have been recorded otherwise."""
        if form != recorded.form:
            return False
        missing: list[tuple[torch.Tensor, torch.Tensor]] = []
        for leaf, static, constant in zip(leaves, recorded.inputs, recorded.constants, strict=True):
            if static is None:
                if isinstance(leaf, torch.Tensor) or leaf != constant:
                    return False
            elif self._held.get(static[0]) is not leaf:
                if not _is_like(leaf, static[1]):
                    return False
                missing.append((leaf, static[1]))
        for leaf, target in missing:
            self._bring(leaf, target)
        return True

    def _bring(self, leaf: torch.Tensor, static: torch.Tensor) -> None:
        self._statics.setdefault(id(leaf), (leaf, static))
        address = static.data_ptr()
        if leaf is static or self._held.get(address) is leaf:
            return
        static.copy_(leaf)
        self._held[address] = leaf

    def _record(self, body: Body, leaves: list[Any], form: object) -> _Recorded:
        if not self._recorded:
            self._recorder.prepare()
        inputs = self._static_inputs(leaves)
        for leaf, static in zip(leaves, inputs, strict=True):
            if static is not None:
                self._bring(leaf, static)
        fixed = (leaf if static is None else static for leaf, static in zip(leaves, inputs, strict=True))
        args, kwargs = rebuild(form, fixed)
        hidden, result = self._hidden, None

        def launch() -> None:
            nonlocal result
            assert hidden is not None, "the inputs are there"
            result = _write_back(body(*args, **kwargs), hidden)

        try:
            replay = self._recorder.record(launch)
        except Exception as error:
            raise RecordError(f"{type(error).__name__}: {error}") from error
        constants = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        known = tuple(None if static is None else (static.data_ptr(), static) for static in inputs)
        return _Recorded(replay, form, known, constants, result)

    def _static_inputs(self, leaves: list[Any]) -> list[torch.Tensor | None]:
        """Tensors that stay, one for each tensor among `leaves`; layers that are given the same one share them."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors:
            raise RecordError("a layer is given no tensor")
        if any(leaf.device.type != self._device.type for leaf in tensors):
            raise RecordError("a layer is given a tensor in host memory, whose value a graph would keep")
        if self._hidden is None:
            self._hidden = torch.empty_like(tensors[0])
        if not _is_like(tensors[0], self._hidden):
            raise RecordError("the layers' hidden states differ in shape or type")
        inputs: list[torch.Tensor | None] = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                inputs.append(None)
            elif leaf is tensors[0] and not any(static is self._hidden for static in inputs):
                inputs.append(self._hidden)
            else:
                inputs.append(self._static_of(leaf, inputs))
        return inputs

    def _static_of(self, leaf: torch.Tensor, taken: list[torch.Tensor | None]) -> torch.Tensor:
        held = self._statics.get(id(leaf))
        # A call that is given a tensor twice may be given two another time.
        if held is None or held[1] is self._hidden or any(static is held[1] for static in taken):
            held = self._statics[id(leaf)] = (leaf, torch.empty_like(leaf))
        return held[1]


class LayerGraphs:
    """All buckets of one engine; used by the sweep thread only, within inference mode.

    Args:
        device: that the layers run on.
        recorder: how launches are recorded; None where they are not.
        gather_tokens: keys and values that attention may bring together, in tokens.
    """

    def __init__(self, device: torch.device, recorder: Recorder | None, gather_tokens: int) -> None:
        self._device = device
        self._recorder = recorder
        self._gather_tokens = gather_tokens
        self.is_enabled = recorder is not None
        self._buckets: dict[tuple[int, int], DecodeBucket] = {}
        self._last: tuple[int, int] | None = None
        self._repeats = 0

    @property
    def num_graphs(self) -> int:
        """Graphs recorded, in all buckets."""
        return sum(bucket.num_graphs for bucket in self._buckets.values())

    @property
    def num_buckets(self) -> int:
        """Buckets made."""
        return len(self._buckets)

    def bucket(self, spans: list[Span]) -> DecodeBucket | None:
        """The bucket to run `spans` in, its pack filled; None where they should be launched one by one."""
        shape = bucket_of(spans, self._gather_tokens) if self.is_enabled else None
        self._repeats = self._repeats + 1 if shape is not None and shape == self._last else 0
        self._last = shape
        if shape is None or (shape not in self._buckets and self._repeats < WARM_SWEEPS - 2):
            return None
        if shape not in self._buckets:
            assert self._recorder is not None, "graphs are enabled"
            self._make_room()
            self._buckets[shape] = DecodeBucket(DecodePack(*shape, self._device), self._device, self._recorder)
        bucket = self._buckets[shape] = self._buckets.pop(shape)  # the one used last comes last
        bucket.begin_sweep(spans)
        return bucket

    def disable(self, reason: BaseException) -> None:
        """Launch kernels one by one from now on."""
        logger.warning("layers of this model cannot be recorded as graphs, they run without: %s", reason)
        self.is_enabled = False
        self._buckets.clear()

    def close(self) -> None:
        """Free every graph; idempotent."""
        self.is_enabled = False
        self._buckets.clear()
        if self._recorder is not None:
            self._recorder.close()

    def _make_room(self) -> None:
        """Drop the buckets not used for longest; what their graphs still have to run, the device finishes first."""
        had_graphs = self.num_graphs > 0
        while self._buckets and (len(self._buckets) >= MAX_BUCKETS or self.num_graphs >= MAX_GRAPHS):
            del self._buckets[next(iter(self._buckets))]
        if had_graphs and not self.num_graphs and self._recorder is not None:
            self._recorder.forget()


def _is_like(leaf: object, static: torch.Tensor) -> bool:
    return (
        isinstance(leaf, torch.Tensor)
        and leaf.shape == static.shape
        and leaf.dtype == static.dtype
        and leaf.device == static.device
    )


def _write_back(result: Any, hidden: torch.Tensor) -> Any:
    """The layer's result with its hidden states in `hidden`, which the next layer reads."""
    parts = result if isinstance(result, tuple) else (result,)
    if not _is_like(parts[0], hidden) or any(isinstance(part, torch.Tensor) for part in parts[1:]):
        raise TypeError(f"a layer returned {type(result).__name__} that is not hidden states like those it was given")
    hidden.copy_(parts[0])
    return (hidden, *parts[1:]) if isinstance(result, tuple) else hidden
