"""Which way a family is run: in packed rows, sequence by sequence, or not at all.

Decides by what the module tree says of itself, never by the family's name. The packed path replaces attention, so it
needs layers that are nothing but attention over keys and values; `stepwise` runs everything else that decodes from
left to right. Called by `architecture` before a shard is written.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from enum import StrEnum
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, cache_utils

from lamella_engine.attention import IMPLEMENTATION, rehearsed_attention
from lamella_engine.errors import UnsupportedModel
from lamella_engine.rehearsal import Rehearsal
from lamella_engine.sequence_state import UNCARRIED_NAMES

_PACKABLE_KINDS = {"full_attention", "sliding_attention"}
_REHEARSED_TOKENS = 8
_PLAIN_CACHE_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}  # of which a version may lack some
_MASK_MAKER = "create_causal_mask"
_INSTEAD = (
    "use a decoder-only family, such as llama, qwen3, mistral, gemma3 or gpt_oss, "
    "or one with a recurrent state, such as qwen3_next or mamba2"
)


class FamilyPath(StrEnum):
    """How the sequences of a sweep meet a layer."""

    PACKED = "packed"  # all in one row, with attention and keys and values of our own
    STEPWISE = "stepwise"  # one after the other, each with transformers' own attention and state


def choose_path(model: PreTrainedModel, layers: nn.ModuleList) -> FamilyPath:
    """The path for `model`, on the meta device; see `check_layers` for those that have none."""
    is_packable = _may_be_packable(model) and _attends_as_packed(model, layers)
    return FamilyPath.PACKED if is_packable else FamilyPath.STEPWISE


def check_decoder(config: PretrainedConfig) -> None:
    """Refuse an encoder with a decoder, by its config, before anything is built.

    Raises:
        UnsupportedModel: it is one.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"family {config.model_type!r} is an encoder with a decoder, which is not run; {_INSTEAD}"
        )


def check_layers(model: PreTrainedModel, layers_path: str, layers: nn.ModuleList) -> None:
    """Refuse what cannot be run from left to right, layer by layer, by its modules.

    Raises:
        UnsupportedModel: it sees what comes after a token, its layers share weights, or what it keeps of a sequence
            has an unknown form.
    """
    family = model.config.model_type
    for name in ("is_decoder", "causal"):
        if any(getattr(module, name, None) is False for module in model.modules()):
            raise UnsupportedModel(
                f"family {family!r} looks at a text from both sides ({name} is false in its config), so it cannot "
                f"continue one token by token; {_INSTEAD}"
            )
    in_layer = re.compile(re.escape(layers_path) + r"\.(\d+)\.")
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        places = {int(match[1]) for name in (target, source) if (match := in_layer.match(name))}
        if len(places) > 1:
            raise UnsupportedModel(
                f"family {family!r} shares weights between layers {' and '.join(map(str, sorted(places)))} "
                f"({target}), and each layer is stored and streamed on its own; {_INSTEAD}"
            )
    if len({id(layer) for layer in layers}) != len(layers):
        raise UnsupportedModel(f"family {family!r} runs the same layer more than once in a pass; {_INSTEAD}")
    unknown = UNCARRIED_NAMES & set(signature(model.forward).parameters)
    if unknown:
        raise UnsupportedModel(
            f"family {family!r} keeps its past in a form that is not carried from sweep to sweep "
            f"({', '.join(sorted(unknown))}); {_INSTEAD}"
        )


def reads_in_parts(model: PreTrainedModel) -> bool:
    """Whether a prompt may be read in several steps, on the stepwise path.

    True where all that is kept are keys and values, and the masks are transformers' own, which know what was read
    before. Some recurrent families forget their state when a step has several tokens; their prompts stay whole.
    """
    if not model._supports_default_dynamic_cache():
        return False
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    plain = {getattr(cache_utils, name, None) for name in _PLAIN_CACHE_LAYERS}
    if {type(layer) for layer in cache.layers} - plain:
        return False
    return any(hasattr(sys.modules[type(part).__module__], _MASK_MAKER) for part in (model, model.base_model))


def _may_be_packable(model: PreTrainedModel) -> bool:
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return (
        not getattr(model, "_is_stateful", False)
        and not kinds - _PACKABLE_KINDS
        and "position_ids" in signature(model.forward).parameters
        and bool(getattr(model, "_supports_attention_backend", False))
    )


def _attends_as_packed(model: PreTrainedModel, layers: nn.ModuleList) -> bool:
    """Whether the layers run in order and hand their attention over, once for each set of keys, with no mask made.

    A rehearsal that comes to an end before its time says nothing against it.
    """
    usual = model.config._attn_implementation
    ids = torch.zeros(1, _REHEARSED_TOKENS, dtype=torch.int64, device="meta")
    fits = True
    with rehearsed_attention() as calls:

        def watch(kind: object, run: Callable[[], Any]) -> Any:
            nonlocal fits
            before = len(calls)
            result = run()
            made = calls[before:]
            numbers = {call.layer for call in made}
            fits = fits and len(numbers) == len(made) > 0 and not any(call.has_mask for call in made)
            return result

        model.set_attn_implementation(IMPLEMENTATION)
        try:
            rehearsal = Rehearsal(model, layers, lambda leaf: False)
            rehearsal.run(
                [lambda: model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False)],
                watch,
                skips=True,
            )
        finally:
            model.set_attn_implementation(usual)
    return fits and rehearsal.order == list(range(len(rehearsal.order)))
