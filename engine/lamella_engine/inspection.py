"""What a model is and what would fit where, from its config and headers alone: no weight is read.

Neighbours: `model_source` finds it, `planner` says what a card would hold, `cli` prints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig

from lamella_engine import architecture
from lamella_engine.calibration import ASSUMED
from lamella_engine.errors import PlanError, UnsupportedModel
from lamella_engine.importers.imported import IMPORTED_FROM
from lamella_engine.kv_shape import kv_bytes_per_token as kv_bytes_per_token
from lamella_engine.kv_shape import kv_shapes, whole
from lamella_engine.model_sizes import sizes_of_contents
from lamella_engine.model_source import ModelContents, ShardContents, find_model
from lamella_engine.model_traits import Experts, Rotary, experts_of, has_linear_biases, layer_kinds, rotary_of
from lamella_engine.placement import ModelSizes, Tier
from lamella_engine.planner import PlanRequest, make_plan
from lamella_engine.shard_store import ShardStore
from lamella_engine.state_size import StateSize

GIB = 1024**3
CARDS_GIB = (4, 6, 8, 12, 24)
CARD_RESERVE_BYTES = GIB // 2  # CUDA context, kernels and the activations of a sweep


_NOTHING = ModelContents(ShardContents(0, ()), ())


@dataclass(frozen=True)
class CardFit:
    """What a card of `card_bytes` would hold: whether the model runs, and how many layers need no streaming."""

    card_bytes: int
    runs: bool
    resident_layers: int


@dataclass(frozen=True)
class ModelFacts:
    """One model in figures; sizes in bytes as stored in the shards.

    Attributes:
        name: as asked for.
        found_in: ``store``, ``path`` or ``hub``.
        revision: the commit, where known.
        family: transformers' model type.
        imported_from: the family's own name, if it is imported onto another's class; see `importers`.
        dtype: torch dtype name of most weights, expanded if they are packed.
        packing: the packed format that the weights arrive in, in words, or that the store has them in; None if plain.
        obstacle: why the model cannot run here, or None. Sizes are 0 then, unless the store has it.
        parameters: numbers in all weights, tied ones counted once.
        active_parameters: those that one token is multiplied with; 0 if there is an obstacle.
        layer_kinds: how many layers there are of each kind.
        experts: the routed experts; None for a dense model, or where sizes are not known.
        rotary: how positions are rotated, one entry a kind of layer; empty without rotary positions.
        has_linear_biases: scores fall with the distance between tokens (ALiBi).
        layer_bytes_min, layer_bytes_max, layers_bytes: smallest layer, largest, all together.
        root_bytes: everything outside the layers, always resident.
        attention_heads: query heads. None where the family has no attention.
        kv_heads, key_widths, value_widths: the distinct values over the layers, ascending.
        context_length: tokens; None where the config names no limit.
        sliding_window: tokens, or None if every layer sees everything.
        kv_bytes_per_token: upper bound for all layers together, in `dtype`.
        state_bytes: what a sequence keeps beside that whatever its length, such as a recurrent state.
        cards: what fits on cards of usual sizes; empty if there is an obstacle.
    """

    name: str
    found_in: str
    revision: str | None
    family: str
    imported_from: str | None
    dtype: str
    packing: str | None
    obstacle: str | None
    parameters: int
    active_parameters: int
    num_layers: int
    layer_kinds: dict[str, int]
    experts: Experts | None
    rotary: tuple[Rotary, ...]
    has_linear_biases: bool
    layer_bytes_min: int
    layer_bytes_max: int
    layers_bytes: int
    root_bytes: int
    hidden_size: int
    attention_heads: int | None
    kv_heads: tuple[int, ...]
    key_widths: tuple[int, ...]
    value_widths: tuple[int, ...]
    context_length: int | None
    sliding_window: int | None
    vocabulary: int
    tied_embeddings: bool
    kv_bytes_per_token: int
    state_bytes: int
    cards: tuple[CardFit, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights."""
        return self.layers_bytes + self.root_bytes


def inspect(model: str | Path, store: ShardStore, *, hub_token: str | None = None) -> ModelFacts:
    """Describe a model of the store, a checkpoint directory, a ``.gguf`` file or a model on the hub.

    Only the hub's ``config.json`` is fetched; sizes then assume the dtype that it names.

    Raises:
        ModelNotFound: it is nowhere.
        ModelError: its config or headers cannot be read, or transformers has no class for its family.
    """
    source = find_model(model, store, hub_token=hub_token)
    text = source.config.get_text_config(decoder=True)
    obstacle: str | None = None
    kept = StateSize(0, kv_bytes_per_token(text, source.torch_dtype), 0)
    contents = source.contents() if source.shards else _NOTHING
    cards: tuple[CardFit, ...] = ()
    active_parameters = 0
    modules: tuple[nn.Module, ...] = ()
    try:
        built = source.build()
        kept, modules = built.state_size or kept, tuple(built.layers)
        contents = source.contents(built)
        sizes = sizes_of_contents(source, contents, built)
        cards, active_parameters = _cards(sizes), sizes.active_parameters
    except UnsupportedModel as error:
        obstacle = str(error)
    shapes = kv_shapes(text)
    layers = tuple(layer.stored_bytes for layer in contents.layers)
    return ModelFacts(
        name=source.name,
        found_in=source.found_in,
        revision=source.revision,
        family=str(source.config.model_type),
        imported_from=getattr(source.config, IMPORTED_FROM, None),
        dtype=source.dtype,
        packing=source.packing,
        obstacle=obstacle,
        parameters=_parameters(contents),
        active_parameters=active_parameters,
        num_layers=int(text.num_hidden_layers),
        layer_kinds=layer_kinds(text),
        experts=experts_of(text, [layer.tensors for layer in contents.layers]),
        rotary=rotary_of(text),
        has_linear_biases=has_linear_biases(text, modules),
        layer_bytes_min=min(layers, default=0),
        layer_bytes_max=max(layers, default=0),
        layers_bytes=sum(layers),
        root_bytes=contents.root.stored_bytes,
        hidden_size=int(text.hidden_size),
        attention_heads=whole(text, "num_attention_heads"),
        kv_heads=tuple(sorted({shape.heads for shape in shapes})),
        key_widths=tuple(sorted({shape.key_width for shape in shapes})),
        value_widths=tuple(sorted({shape.value_width for shape in shapes})),
        context_length=whole(text, "max_position_embeddings"),
        sliding_window=_narrowest_window(text),
        vocabulary=int(text.vocab_size),
        tied_embeddings=bool(getattr(source.config, "tie_word_embeddings", False)),
        kv_bytes_per_token=kept.token_bytes,
        state_bytes=kept.sequence_bytes,
        cards=cards,
    )


def _parameters(contents: ModelContents) -> int:
    return sum(math.prod(tensor.shape) for shard in (contents.root, *contents.layers) for tensor in shard.tensors)


def _narrowest_window(config: PretrainedConfig) -> int | None:
    windows = architecture.sliding_windows(config, int(config.num_hidden_layers))
    return min((window for window in windows if window is not None), default=None)


def _cards(sizes: ModelSizes) -> tuple[CardFit, ...]:
    return tuple(_card(gib * GIB, sizes) for gib in CARDS_GIB)


def _card(card_bytes: int, sizes: ModelSizes) -> CardFit:
    """What a plan for one sequence of a useful length does on a card that has nothing else to do."""
    request = PlanRequest("cuda", card_bytes - CARD_RESERVE_BYTES, 0, ASSUMED, max_sequences=1)
    try:
        plan = make_plan(sizes, request)
    except PlanError:
        return CardFit(card_bytes, False, 0)
    return CardFit(card_bytes, True, sum(place.tier is Tier.VRAM for place in plan.layers))
