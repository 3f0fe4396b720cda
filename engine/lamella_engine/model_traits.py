"""What kinds of layers, experts and positions a model has, told from its config and its tensors' shapes.

Pure: nothing is read. `inspection` puts these beside the sizes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature

from torch import nn
from transformers import PretrainedConfig

from lamella_engine.alibi import slopes_of
from lamella_engine.kv_shape import whole
from lamella_engine.shard_writer import size_of
from lamella_engine.weight_source import TensorShape

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ROUTED_COUNTS = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")
_KIND_LISTS = ("layer_types", "layers_block_type")
_SHARED_EXPERT = re.compile(r"(^|\.)shared_(experts?|mlp)\.")
_EXPERT = re.compile(r"(^|\.)experts\.")


@dataclass(frozen=True)
class Experts:
    """The routed experts of a mixture-of-experts model.

    Attributes:
        count: experts of one layer.
        routed: how many of them a token visits.
        layers: layers that have them; the others are dense.
        nbytes: of all of them, as stored.
        expert_bytes: of one, on average.
        shared_bytes: of the experts that every token visits beside them.
    """

    count: int
    routed: int
    layers: int
    nbytes: int
    expert_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of the layers of one kind.

    Attributes:
        layers: kind of layer they are for; None for all.
        kind: how frequencies are scaled: ``default``, ``yarn``, ``llama3``, ``linear``, ``dynamic``, ...
        base: of the frequencies, often called theta.
        share: part of each head that is rotated.
        factor: by how much the context is stretched; None where it is not.
    """

    layers: str | None
    kind: str
    base: float | None
    share: float
    factor: float | None


def layer_kinds(text: PretrainedConfig) -> dict[str, int]:
    """How many layers there are of each kind, such as ``full_attention`` or ``linear_attention``; most frequent first.

    A config that names no kinds has one: attention, or a recurrence where there are no heads.
    """
    count = int(text.num_hidden_layers)
    for name in _KIND_LISTS:
        kinds = getattr(text, name, None)
        if isinstance(kinds, list | tuple) and len(kinds) == count:
            return dict(Counter(str(kind) for kind in kinds).most_common())
    has_attention = whole(text, "num_attention_heads") is not None
    window = whole(text, "sliding_window") if getattr(text, "use_sliding_window", True) else None
    return {("sliding_attention" if window else "full_attention") if has_attention else "recurrent": count}


def experts_of(text: PretrainedConfig, layers: Sequence[Sequence[TensorShape]]) -> Experts | None:
    """The experts among the tensors of `layers`; None for a dense model, or where the tensors are not known."""
    count, routed = first_whole(text, EXPERT_COUNTS), first_whole(text, ROUTED_COUNTS)
    expert_bytes = [_bytes_matching(_EXPERT, layer) for layer in layers]
    with_experts = sum(nbytes > 0 for nbytes in expert_bytes)
    if not count or not with_experts:
        return None
    return Experts(
        count=count,
        routed=routed or count,
        layers=with_experts,
        nbytes=sum(expert_bytes),
        expert_bytes=sum(expert_bytes) // (with_experts * count),
        shared_bytes=sum(_bytes_matching(_SHARED_EXPERT, layer) for layer in layers),
    )


def rotary_of(text: PretrainedConfig) -> tuple[Rotary, ...]:
    """How positions are rotated, one entry a kind of layer that differs; empty for a model without rotary positions."""
    parameters = getattr(text, "rope_parameters", None)
    rotating = getattr(text, "no_rope_layers", None)  # which layers do, despite its name
    is_rotating = not isinstance(rotating, list) or any(rotating) or not rotating
    if not isinstance(parameters, dict) or not parameters or not is_rotating or _names_linear_biases(text):
        return ()
    if all(isinstance(part, dict) for part in parameters.values()):
        return tuple(_rotary(kind, part, text) for kind, part in parameters.items())
    return (_rotary(None, parameters, text),)


def has_linear_biases(text: PretrainedConfig, layers: Iterable[nn.Module]) -> bool:
    """Whether scores fall with the distance between tokens (ALiBi): by the config, or as `layers` must be given it."""
    named = _names_linear_biases(text)
    return any(map(_must_be_given_biases, layers)) if named is None else named


def first_whole(text: PretrainedConfig, names: Sequence[str]) -> int | None:
    """The first of the config's values `names` that is a whole number above 0."""
    return next((found for name in names if (found := whole(text, name))), None)


def _names_linear_biases(text: PretrainedConfig) -> bool | None:
    """What the config says of linear biases; None if it says nothing."""
    flags = (getattr(owner, "alibi", None) for owner in (text, getattr(text, "attn_config", None)))
    named = next((flag for flag in flags if isinstance(flag, bool)), None)
    return True if slopes_of(text) is not None else named


def _must_be_given_biases(layer: nn.Module) -> bool:
    given = signature(layer.forward).parameters.get("alibi")
    return given is not None and given.default is Parameter.empty


def _rotary(layers: str | None, parameters: dict[str, object], text: PretrainedConfig) -> Rotary:
    share = _number(parameters.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None)))
    return Rotary(
        layers=layers,
        kind=str(parameters.get("rope_type", "default")),
        base=_number(parameters.get("rope_theta")),
        share=1.0 if share is None else share,
        factor=_number(parameters.get("factor")),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _bytes_matching(pattern: re.Pattern[str], tensors: Sequence[TensorShape]) -> int:
    return sum(size_of(tensor) for tensor in tensors if pattern.search(tensor.name))
