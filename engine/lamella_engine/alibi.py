"""Linear position biases (ALiBi): a head's score falls by its slope for every token between a query and a key.

Owns how a native class that computes none is told to have them, as one slope a head in its config, and the published
series of slopes. Which family has them is not known here: an importer sets the slopes, `attention` adds the biases.
"""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from lamella_engine.errors import CheckpointError
from lamella_engine.importers.imported import IMPORTED_FROM

SLOPES = "alibi_slopes"  # in the native config of an imported model, and so in config.json of the shards


def published_slopes(num_heads: int) -> list[float]:
    """The slopes of "Train Short, Test Long" (Press, Smith, Lewis, 2021) for `num_heads` heads.

    For n heads, n a power of two, 2 to the powers -8/n, -16/n, ... -8. Other numbers of heads take these for the next
    lower power of two, then every other one, from the first on, of those for twice as many heads.
    """
    whole = 1 << (num_heads.bit_length() - 1)
    return _series(whole) + _series(2 * whole)[::2][: num_heads - whole]


def slopes_of(config: PretrainedConfig) -> tuple[float, ...] | None:
    """Each query head's slope; None for a model without biases of ours.

    Only imported models have them: the key means nothing to transformers, which would run the checkpoint without.

    Raises:
        CheckpointError: there is not one finite number a head.
    """
    found = getattr(config, SLOPES, None)
    if found is None or getattr(config, IMPORTED_FROM, None) is None:
        return None
    heads = config.num_attention_heads
    if not isinstance(found, list | tuple) or len(found) != heads or not all(map(_is_finite, found)):
        raise CheckpointError(
            f"{SLOPES!r} in the config of this {getattr(config, IMPORTED_FROM)} model is not {heads} numbers, one for "
            "each head; import the model again"
        )
    return tuple(float(slope) for slope in found)


def _series(num_heads: int) -> list[float]:
    return [2.0 ** (-8.0 * number / num_heads) for number in range(1, num_heads + 1)]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
