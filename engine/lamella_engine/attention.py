"""Attention over the packed sweep, in the form transformers calls it.

Registered once under the name ``lamella``; each call stores the new keys and values in the key-value cache and attends
every query to its own sequence only. One-token spans are served in a few padded batches, longer spans one by one. Only
kernels that old cards have are used, and no score matrix grows with the square of the context. Linear position biases
(`alibi`) are added for classes that compute none themselves. The sweep in progress is thread-local, so that models
which drop unknown keyword arguments work too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lamella_engine.errors import EngineError
from lamella_engine.kv_cache import KVCache
from lamella_engine.packing import ChunkedSpan, DecodeGroup, Pack
from lamella_engine.workspace import ATTENTION_SCRATCH_BYTES

IMPLEMENTATION = "lamella"
SCORE_BYTES = ATTENTION_SCRATCH_BYTES  # the float32 scores of one step, should a kernel write them out
WRITTEN_OUT = 4  # times scores are there at once where attention is written out: scaled, masked, as weights, cast


@dataclass(frozen=True)
class _Sweep:
    pack: Pack
    cache: KVCache
    windows: tuple[int | None, ...]
    slopes: torch.Tensor | None


class AttentionCall(NamedTuple):
    """One call of a rehearsal: for which layer, and whether with a mask of the family's own making."""

    layer: int
    has_mask: bool


class _Current(threading.local):
    sweep: _Sweep | None = None
    rehearsal: list[AttentionCall] | None = None


_current = _Current()


@contextmanager
def sweep_attention(
    pack: Pack, cache: KVCache, windows: tuple[int | None, ...], slopes: torch.Tensor | None = None
) -> Iterator[None]:
    """Let attention calls of this thread serve `pack`.

    `windows` is each layer's sliding window in tokens, or None; `slopes` (float32 [heads]) adds linear position biases.
    """
    _current.sweep = _Sweep(pack, cache, windows, slopes)
    try:
        yield
    finally:
        _current.sweep = None


@contextmanager
def rehearsed_attention() -> Iterator[list[AttentionCall]]:
    """Let attention calls of this thread compute nothing and be listed."""
    _current.rehearsal = []
    try:
        yield _current.rehearsal
    finally:
        _current.rehearsal = None


@dataclass(frozen=True)
class _Form:
    """What a layer asks of the softmax: scale, soft cap on the scores, per-head sink logits and position slopes."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    slopes: torch.Tensor | None

    @property
    def is_written_out(self) -> bool:
        """No kernel computes it."""
        return self.softcap is not None or self.sinks is not None


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls: `query`, `key`, `value` are [1, heads, T, width]; returns [1, T, heads, width].

    Understands ``sliding_window``, ``softcap`` and ``s_aux`` (attention sinks); causality comes from the pack.
    """
    layer = module.layer_idx
    assert isinstance(layer, int), "transformers numbers its attention layers"
    if _current.rehearsal is not None:
        _current.rehearsal.append(AttentionCall(layer, attention_mask is not None))
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]), None
    sweep = _current.sweep
    if sweep is None:
        raise EngineError("packed attention was called outside a sweep")
    window = kwargs.get("sliding_window") or sweep.windows[layer]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    form = _Form(scale, kwargs.get("softcap"), kwargs.get("s_aux"), sweep.slopes)
    pack, cache = sweep.pack, sweep.cache
    cache.store(layer, pack.write_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    parts = []
    for group in pack.groups:
        keys, values = cache.load(layer, group.slots)
        rows = query[0, :, group.first : group.first + group.count]
        parts.append(_attend_singles(rows, keys, values, group, window, form))
    for chunk in pack.chunks:
        keys, values = cache.load(layer, chunk.slots)
        rows = query[:, :, chunk.row : chunk.row + chunk.count]
        parts.append(_attend_chunk(rows, keys, values, chunk, window, form))
    return torch.cat(parts)[None] if len(parts) > 1 else parts[0][None], None


def _attend_singles(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: DecodeGroup,
    window: int | None,
    form: _Form,
) -> torch.Tensor:
    """Decode: `query` [H, B, D], `keys`, `values` [B, L, Hk, D] -> [B, H, D].

    The query heads that share a key head take the place of query positions, so keys are never repeated.
    """
    heads, batch, width = query.shape
    key_heads = keys.shape[2]
    repeats = heads // key_heads
    grouped = query.permute(1, 0, 2).reshape(batch, key_heads, repeats, width)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    seen = group.mask(window)
    if form.slopes is not None:
        seen = _biases(form.slopes.reshape(1, key_heads, repeats, 1), group.offsets(), seen, query.dtype)
    if form.is_written_out:
        sinks = None if form.sinks is None else form.sinks.reshape(1, key_heads, repeats, 1)
        out = _softmax_attention(grouped, keys, values, seen, form, sinks)
    else:
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=seen, scale=form.scale)
    return out.reshape(batch, heads, -1)


def _attend_chunk(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: ChunkedSpan,
    window: int | None,
    form: _Form,
) -> torch.Tensor:
    """Prefill: `query` [1, H, n, D], `keys`, `values` [L, Hk, D] -> [n, H, D].

    The query heads that share a key head are a batch over the same keys, so that keys are never repeated.
    """
    heads, count, width = query.shape[1:]
    length, key_heads = keys.shape[:2]
    repeats = heads // key_heads
    grouped = query[0].reshape(key_heads, repeats, count, width).transpose(0, 1)
    keys = keys.transpose(0, 1).expand(repeats, -1, -1, -1)
    values = values.transpose(0, 1).expand(repeats, -1, -1, -1)
    is_plain = form.slopes is None and not form.is_written_out
    step = max(16, SCORE_BYTES // (4 * heads * length * (1 if is_plain else WRITTEN_OUT)))
    if is_plain and count <= step and chunk.is_plain_causal(window):
        out = scaled_dot_product_attention(grouped, keys, values, is_causal=True, scale=form.scale)
        return out.transpose(0, 1).reshape(heads, count, -1).transpose(0, 1)
    sinks, slopes = (_by_key_head(per_head, key_heads) for per_head in (form.sinks, form.slopes))
    parts = []
    for first in range(0, count, step):
        rows, seen = grouped[:, :, first : first + step], chunk.mask(window)[first : first + step]
        if slopes is not None:
            seen = _biases(slopes, chunk.offsets(first, rows.shape[2]), seen, query.dtype)
        if form.is_written_out:
            parts.append(_softmax_attention(rows, keys, values, seen, form, sinks))
        else:
            parts.append(scaled_dot_product_attention(rows, keys, values, attn_mask=seen, scale=form.scale))
    out = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
    return out.transpose(0, 1).reshape(heads, count, -1).transpose(0, 1)


def _by_key_head(per_head: torch.Tensor | None, key_heads: int) -> torch.Tensor | None:
    """A number for each query head, [H] -> [H / Hk, Hk, 1, 1]."""
    return None if per_head is None else per_head.reshape(key_heads, -1).T[..., None, None]


def _biases(slopes: torch.Tensor, offsets: torch.Tensor, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What linear position biases add to the scores, minus infinity where a query may not look (`seen` is false).

    Distances and slopes are multiplied in float32: half precision does not tell far positions apart.
    """
    return (slopes * offsets).masked_fill_(~seen, -torch.inf).to(dtype)


def _softmax_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    form: _Form,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention written out, for soft caps and sinks; a sink takes part in the softmax and carries no value.

    `seen` says where a query may look, or what is added to its scores.
    """
    scores = (query @ keys.transpose(-1, -2)) * form.scale
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    is_mask = seen.dtype is torch.bool
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min) if is_mask else scores + seen
    if sinks is None:
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    else:
        column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
        weights = (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1]
    return weights @ values


# With no function for masks under this name, transformers build none; they come from the pack.
AttentionInterface.register(IMPLEMENTATION, packed_attention)
