"""What each layer keeps of a token for attention, by the config alone.

Owns the arithmetic from config values to keys and values. `inspection` tells it, `model_sizes` plans with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

NO_CONTEXT_LIMIT = 1 << 20  # tokens, for families whose config names no limit; the cache sets one then


@dataclass(frozen=True)
class KVShape:
    """What one layer keeps of one token: `heads` keys of `key_width` numbers and as many values of `value_width`."""

    heads: int
    key_width: int
    value_width: int

    @property
    def width(self) -> int:
        """Numbers in all."""
        return self.heads * (self.key_width + self.value_width)


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes in all layers together, in the packed sweep; an upper bound.

    `config` may nest a text model's config. Sliding-window layers count in full, layers that share keys too. Latent
    attention counts as transformers hands it to attention: expanded to one key and one value per query head.
    """
    shapes = kv_shapes(config.get_text_config(decoder=True))
    return sum(shape.width for shape in shapes) * dtype.itemsize


def kv_shapes(config: PretrainedConfig) -> list[KVShape]:
    """Each layer's key-value shape; empty for a family without attention."""
    if whole(config, "num_attention_heads") is None:
        return []
    return [_kv_shape(layer) for layer in config.per_layer_config]


def attention_width(config: PretrainedConfig) -> int:
    """Numbers in all query heads of the widest layer, keys and values not counted; 0 without attention."""
    shapes = kv_shapes(config)
    heads = whole(config, "num_attention_heads") or 0
    return max((heads * max(shape.key_width, shape.value_width) for shape in shapes), default=0)


def context_tokens(config: PretrainedConfig) -> int:
    """Tokens that a sequence may have by its config."""
    return whole(config, "max_position_embeddings") or NO_CONTEXT_LIMIT


def whole(config: PretrainedConfig, name: str) -> int | None:
    """A config value that is a whole number, else None; the largest where layers differ."""
    try:
        values = [getattr(config, name, None)]
    except RuntimeError:  # transformers' answer to a value that layers do not share
        values = [getattr(layer, name, None) for layer in config.per_layer_config]
    return max((int(value) for value in values if isinstance(value, int)), default=None)


def _kv_shape(layer: PretrainedConfig) -> KVShape:
    query_heads = int(layer.num_attention_heads)
    if whole(layer, "kv_lora_rank"):
        key_width = int(layer.qk_nope_head_dim) + int(layer.qk_rope_head_dim)
        return KVShape(query_heads, key_width, int(layer.v_head_dim))
    heads = whole(layer, "num_key_value_heads") or whole(layer, "num_kv_heads") or query_heads
    key_width = whole(layer, "head_dim") or int(layer.hidden_size) // query_heads
    return KVShape(heads, key_width, whole(layer, "v_head_dim") or key_width)
