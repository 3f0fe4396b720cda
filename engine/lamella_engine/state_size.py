"""What a sequence takes in memory on the stepwise path, found by a rehearsal on the meta device.

There is no formula for what families keep, so the model itself is asked: it runs on tensors without memory, and the
size of its state and of what it computes with is read off. Called by `architecture` once a model is built;
`model_sizes` and `state_pool` use the figures.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lamella_engine.errors import UnsupportedModel
from lamella_engine.kv_shape import kv_bytes_per_token, whole
from lamella_engine.rehearsal import Rehearsal
from lamella_engine.sequence_state import SequenceState, StateForward

REHEARSED_TOKENS = 64  # many families compute in blocks of so many tokens, and pad the last one
_FEW_TOKENS = 8
_MANY_TOKENS = 512  # where what grows with the square of a step's tokens stands out


@dataclass(frozen=True)
class StateSize:
    """What a sequence takes in all layers together, in the compute dtype; upper bounds.

    Attributes:
        sequence_bytes: whatever its length, such as a recurrent state or a window.
        token_bytes: for each of its tokens.
        activation_bytes: what a step computes with, for each of its tokens.
        pair_bytes: what a step computes with for each of its tokens and each token that one looks at, beside attention.
        score_heads: query heads whose scores against all earlier tokens are written out; 0 where a kernel keeps them.
        in_modules: for each layer, the attributes of its modules that hold a part of the state, by dotted path.
    """

    sequence_bytes: int
    token_bytes: int
    activation_bytes: int
    pair_bytes: int = 0
    score_heads: int = 0
    in_modules: tuple[tuple[str, ...], ...] = ()


def rehearse(model: PreTrainedModel, layers: nn.ModuleList) -> StateSize:
    """The size of `model`'s states; the model is on the meta device and is left as it was.

    Raises:
        UnsupportedModel: it does not call each of `layers` once, in order, or changes their weights.
    """
    config = model.config.get_text_config(decoder=True)
    shorter, longer = (_Measured(model, layers, tokens) for tokens in (REHEARSED_TOKENS, 2 * REHEARSED_TOKENS))
    _check_order(model, shorter.rehearsal.order, len(layers))
    if shorter.rehearsal.rewrites_weights:
        raise UnsupportedModel(
            f"family {model.config.model_type!r} changes the weights of its layers as it runs, and streamed weights "
            "would not keep that; use another family, such as llama, qwen3, mistral, gemma3 or gpt_oss"
        )
    is_written_out = model.config._attn_implementation == "eager"
    heads = (whole(config, "num_attention_heads") or 0) if is_written_out else 0
    pairs = 0 if is_written_out else _pair_bytes(model, layers, shorter, longer)
    activations = max(-(-step.peak_bytes // step.tokens) - pairs * step.tokens for step in (shorter, longer))
    growth = max(0, longer.state_bytes - shorter.state_bytes)
    fixed, token_bytes = max(0, longer.state_bytes - 2 * growth), -(-growth // REHEARSED_TOKENS)
    if not (shorter.rehearsal.is_whole and longer.rehearsal.is_whole):
        # What could not be rehearsed may have kept something: count as if every layer were attention.
        fixed, token_bytes = longer.state_bytes, kv_bytes_per_token(config, model.dtype)
    return StateSize(fixed, token_bytes, activations, pairs, heads, _in_modules(shorter.rehearsal))


def kept_in_modules(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[tuple[str, ...], ...]:
    """As `StateSize.in_modules`, by a rehearsal that measures nothing else; for a copy of a model that passed one."""
    return _in_modules(_Measured(model, layers, _FEW_TOKENS).rehearsal)


def _in_modules(rehearsal: Rehearsal) -> tuple[tuple[str, ...], ...]:
    return tuple(rehearsal.changed.get(kind, ()) for kind in rehearsal.kinds)


def _pair_bytes(model: PreTrainedModel, layers: nn.ModuleList, shorter: _Measured, longer: _Measured) -> int:
    """What grows with the square of a step's tokens; a third rehearsal tells, where two hint at it."""
    before = longer.peak_bytes / longer.tokens
    if before <= shorter.peak_bytes / shorter.tokens:
        return 0
    many = _Measured(model, layers, _MANY_TOKENS)
    return max(0, math.ceil((many.peak_bytes / many.tokens - before) / (many.tokens - longer.tokens)))


def _check_order(model: PreTrainedModel, order: list[int], num_layers: int) -> None:
    """Refuse another order; an incomplete one says only that the rehearsal came to an end before its time."""
    if order != list(range(len(order))) or len(order) > num_layers:
        raise UnsupportedModel(
            f"family {model.config.model_type!r} runs its layers in the order {', '.join(map(str, order[:12]))}"
            f"{', ...' if len(order) > 12 else ''}; only families that run each layer once, in order, can be "
            "streamed, such as llama, qwen3, mistral, gemma3 or gpt_oss"
        )


class _Measured:
    """A step of `tokens` tokens and one of a single token, on a fresh state.

    Attributes:
        tokens: of the first step.
        rehearsal: how it went.
        state_bytes: of the state after both steps.
        peak_bytes: most that was alive at once in the first step, beside weights.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, tokens: int) -> None:
        forward = StateForward(model, torch.device("meta"))
        state = SequenceState()
        kept: dict[object, int] = {}
        self.tokens = tokens
        self.peak_bytes = 0

        def watch(kind: object, run: Callable[[], Any]) -> Any:
            before = state.nbytes
            result = run()
            kept[kind] = kept.get(kind, 0) + state.nbytes - before
            return result

        def first() -> None:
            with _NoScores(), _LiveBytes(model) as live:
                try:
                    forward(state, [0] * tokens)
                finally:
                    self.peak_bytes = live.peak

        self.rehearsal = Rehearsal(model, layers, lambda leaf: state.cache is not None and leaf is state.cache)
        # A cache that the family makes itself cannot be looked at between two layers: all of them run then.
        self.rehearsal.run([first, lambda: forward(state, [0])], watch, skips=forward.makes_cache)
        in_layers = sum(kept.get(kind, 0) for kind in self.rehearsal.kinds)
        self.state_bytes = in_layers if forward.makes_cache else state.nbytes


class _NoScores(TorchFunctionMode):
    """Leaves attention's scores out, which kernels keep to themselves where there is memory to compute in."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and len(args) >= 3:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it without types
    """Counts the bytes of tensors made within it that are alive, and the most there were at once; not `model`'s own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch leaves it without types
        self.peak = 0
        self._now = 0
        self._given = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive or key in self._given:
            return
        nbytes = storage.nbytes()

        def drop(_: object) -> None:
            self._now -= nbytes
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, drop)
        self._now += nbytes
        self.peak = max(self.peak, self._now)
