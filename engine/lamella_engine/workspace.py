"""How much memory a sweep needs beside weights, keys and values: activations, logits, gathered keys and values.

Pure arithmetic, with the reason for each term. `planner` reserves it, attention keeps within the two bounds below.
"""

from __future__ import annotations

from lamella_engine.placement import ModelSizes

MIB = 1024**2
FLOAT32_BYTES = 4

# What matrix libraries and the driver's allocator keep of a process (cuBLAS: up to 32 MiB; oneDNN: its packed blocks).
LIBRARY_BYTES = 40 * MIB
# Decoding sequences are gathered in groups whose keys and values fit in this; one sequence is always a group.
GATHER_BYTES = 64 * MIB
# A prompt chunk's scores, masks and repeated keys; longer ones are taken in pieces that fit.
ATTENTION_SCRATCH_BYTES = 64 * MIB

# Rows of width `hidden_size` that live at once: the residual, what is added to it, the normalised input, and a copy
# where a norm's result is cast.
_HIDDEN_ROWS = 4
# A norm is computed in float32, with the row and its square alive.
_FLOAT32_HIDDEN_ROWS = 2
# Query, key and value, each also rotated, and the attention's result; keys and values are no wider than the query.
_ATTENTION_ROWS = 7
# Gate, up, the activated gate and their product.
_INTERMEDIATE_ROWS = 4
# Logits as the head gives them, as float32, and sorted or penalised by the sampler.
_LOGIT_COPIES = 3
_NARROWEST_HEAD = 32  # numbers a head has at least, which bounds the heads that `attention_width` is made of


def workspace_bytes(sizes: ModelSizes, sweep_tokens: int, max_sequences: int, kv_tokens: int) -> int:
    """Bytes that a sweep of `sweep_tokens` tokens may take beside weights and the cache of `kv_tokens` tokens.

    The sum of parts that are not all alive at once: an allocator that caches blocks keeps those of attention while the
    next part asks for others.
    """
    return sweep_bytes(sizes, sweep_tokens, max_sequences, kv_tokens) + gather_bytes(sizes, kv_tokens)


def sweep_bytes(sizes: ModelSizes, sweep_tokens: int, max_sequences: int, kv_tokens: int) -> int:
    """The part that grows with the tokens of a sweep and the sequences in it, and what the libraries keep."""
    widths = (
        _HIDDEN_ROWS * sizes.hidden_size
        + _ATTENTION_ROWS * sizes.attention_width
        + _INTERMEDIATE_ROWS * sizes.intermediate_size
    )
    a_token = widths * sizes.itemsize + _FLOAT32_HIDDEN_ROWS * sizes.hidden_size * FLOAT32_BYTES
    logits = max_sequences * sizes.vocabulary * FLOAT32_BYTES * _LOGIT_COPIES
    return LIBRARY_BYTES + sweep_tokens * a_token + logits + _scratch_bytes(sizes, sweep_tokens, kv_tokens)


def gather_bytes(sizes: ModelSizes, kv_tokens: int) -> int:
    """Keys and values of one layer brought together for decoding: twice, as the next layer's block may differ.

    Within `GATHER_BYTES`, unless the longest sequence alone needs more; never more than twice the whole cache of a
    layer.
    """
    a_token = -(-sizes.kv_bytes_per_token // len(sizes.layers))
    longest = min(kv_tokens, sizes.context_length)
    return min(2 * kv_tokens * a_token, max(GATHER_BYTES, 2 * longest * a_token))


def _scratch_bytes(sizes: ModelSizes, sweep_tokens: int, kv_tokens: int) -> int:
    longest = min(kv_tokens, sizes.context_length)
    repeated = 2 * longest * sizes.attention_width * sizes.itemsize
    heads = -(-sizes.attention_width // _NARROWEST_HEAD)
    scores = 2 * heads * sweep_tokens * longest * FLOAT32_BYTES
    return min(ATTENTION_SCRATCH_BYTES, repeated + scores)
