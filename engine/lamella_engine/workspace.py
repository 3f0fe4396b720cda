"""How much memory a sweep needs beside weights, keys and values: activations, logits, gathered keys and values.

Pure arithmetic, with the reason for each term. `reserve` sets it aside; `packing`, `attention` and `layer_graphs` keep
within the bounds below.
"""

from __future__ import annotations

from lamella_engine.placement import ModelSizes

MIB = 1024**2
FLOAT32_BYTES = 4

# What matrix libraries and the driver's allocator keep of a process (cuBLAS: up to 32 MiB; oneDNN: its packed blocks).
LIBRARY_BYTES = 40 * MIB
# Decoding sequences are gathered in groups whose keys and values fit in half of this, as attention may copy them where
# it cannot read them as they lie; one sequence is always a group.
GATHER_BYTES = 64 * MIB
MAX_GATHER_TOKENS = 32768  # of a group, however narrow keys and values are
MAX_PADDING = 2  # a group may be padded to so many times its shortest sequence
FREE_TOKENS = 256  # below this length padding costs nothing worth a second group
# Graphs take their own memory beside what launches take: the stream they are recorded on has a workspace of the matrix
# library, and each bucket of shapes has inputs that stay.
GRAPH_LIBRARY_BYTES = 32 * MIB
MAX_BUCKETS = 12
BUCKET_STEP = 8  # sequences up to which buckets double
# A prompt chunk's scores, masks and repeated keys; longer ones are taken in pieces that fit.
ATTENTION_SCRATCH_BYTES = 64 * MIB

# Rows of width `hidden_size` that live at once: the gathered rows of the embedding, the residual, what is added to it,
# the normalised input, and a copy where a norm's result is cast.
_HIDDEN_ROWS = 5
# A norm is computed in float32, with the row and its square alive.
_FLOAT32_HIDDEN_ROWS = 2
# Query, key and value, each also rotated, and the attention's result; keys and values are no wider than the query.
_ATTENTION_ROWS = 7
# Gate, up, the activated gate and their product.
_INTERMEDIATE_ROWS = 4
# Logits as the head gives them, as float32, those rows that get a token, and penalised or sorted by the sampler.
_LOGIT_COPIES = 4
# Where a prompt's chunk may look, one byte a token and position: for layers with and without a window.
_MASKS = 2
# What a bucket keeps for each token of its groups: where it lies (eight bytes), and masks.
_BUCKET_BYTES_A_TOKEN = 8 + _MASKS
_SCORE_COPIES = 4  # of scores that transformers writes out: scaled, masked, as weights, cast
_NARROWEST_HEAD = 32  # numbers a head has at least, which bounds the heads that `attention_width` is made of


def workspace_bytes(sizes: ModelSizes, sweep_tokens: int, max_sequences: int, kv_tokens: int) -> int:
    """Bytes that a sweep of `sweep_tokens` tokens may take beside weights and the cache of `kv_tokens` tokens.

    The sum of parts that are not all alive at once: an allocator that caches blocks keeps those of attention while the
    next part asks for others.
    """
    return sweep_bytes(sizes, sweep_tokens, max_sequences, kv_tokens) + gather_bytes(sizes, max_sequences, kv_tokens)


def sweep_bytes(sizes: ModelSizes, sweep_tokens: int, max_sequences: int, kv_tokens: int) -> int:
    """The part that grows with the tokens of a sweep and the sequences in it, and what the libraries keep."""
    logits = max_sequences * sizes.vocabulary * FLOAT32_BYTES * _LOGIT_COPIES
    masks = _MASKS * sweep_tokens * _longest(sizes, kv_tokens)
    return (
        LIBRARY_BYTES
        + sweep_tokens * _token_bytes(sizes)
        + logits
        + masks
        + _scratch_bytes(sizes, sweep_tokens, kv_tokens)
    )


def bytes_beside(sizes: ModelSizes, sweep_tokens: int, kv_tokens: int, step_tokens: int) -> int:
    """What a step of `step_tokens` tokens, alone in its sweep, takes beyond what a sweep of `sweep_tokens` may take."""
    planned = sweep_bytes(sizes, sweep_tokens, 1, kv_tokens)
    return max(0, sweep_bytes(sizes, step_tokens, 1, step_tokens) - planned)


def gather_bytes(sizes: ModelSizes, max_sequences: int, kv_tokens: int) -> int:
    """Keys and values of one layer brought together for decoding, twice: attention may copy them; and position biases.

    Keys and values are within `GATHER_BYTES`, unless the longest sequence alone needs more.
    """
    return _gathered_bytes(sizes, max_sequences, kv_tokens) + _bias_bytes(sizes, kv_tokens)


def gather_tokens(kv_bytes: int, kv_tokens: int) -> int:
    """Tokens that a group of decoding sequences may have, where one layer's cache of `kv_tokens` takes `kv_bytes`."""
    return max(1, min(MAX_GATHER_TOKENS, GATHER_BYTES // 2 * kv_tokens // max(1, kv_bytes)))


def graph_bytes(sizes: ModelSizes, max_sequences: int, kv_tokens: int) -> int:
    """What graphs of decoding layers take for good: what launching the largest one takes, and every bucket's inputs."""
    rows = bucket_size(max_sequences)
    group = _group_tokens(sizes, kv_tokens)
    token_bytes = _BUCKET_BYTES_A_TOKEN + (FLOAT32_BYTES if sizes.bias_heads else 0)  # and how far away it is
    inputs = rows * 2 * sizes.hidden_size * sizes.itemsize + group * token_bytes
    gathered = min(
        GATHER_BYTES * 3 // 4, _gathered_bytes(sizes, rows, kv_tokens)
    )  # keys, values, a copy of one of them
    launched = rows * _token_bytes(sizes) + gathered + _bias_bytes(sizes, kv_tokens)
    return GRAPH_LIBRARY_BYTES + launched + MAX_BUCKETS * inputs


def bucket_size(value: int, step: int = BUCKET_STEP) -> int:
    """The next power of two up to `step`, above it the next quarter of a power of two."""
    if value <= step:
        return 1 << (value - 1).bit_length()
    unit = (1 << ((value - 1).bit_length() - 1)) // 4
    return -(-value // unit) * unit


def _token_bytes(sizes: ModelSizes) -> int:
    """Activations of one token."""
    widths = (
        _HIDDEN_ROWS * sizes.hidden_size
        + _ATTENTION_ROWS * sizes.attention_width
        + _INTERMEDIATE_ROWS * sizes.intermediate_size
    )
    measured = sizes.activation_bytes
    return widths * sizes.itemsize + _FLOAT32_HIDDEN_ROWS * sizes.hidden_size * FLOAT32_BYTES + measured


def _gathered_bytes(sizes: ModelSizes, max_sequences: int, kv_tokens: int) -> int:
    a_token = -(-sizes.kv_bytes_per_token // len(sizes.layers))
    padded = max(MAX_PADDING * kv_tokens, max_sequences * min(MAX_PADDING * FREE_TOKENS, kv_tokens))
    return min(2 * padded * a_token, max(GATHER_BYTES, 2 * _longest(sizes, kv_tokens) * a_token))


def _group_tokens(sizes: ModelSizes, kv_tokens: int) -> int:
    return gather_tokens(sizes.kv_bytes_per_token * kv_tokens, kv_tokens * len(sizes.layers))


def _bias_bytes(sizes: ModelSizes, kv_tokens: int) -> int:
    """Position biases of a group of decoding sequences, in float32 and as attention takes them."""
    group = max(_group_tokens(sizes, kv_tokens), _longest(sizes, kv_tokens))
    return 2 * FLOAT32_BYTES * sizes.bias_heads * group


def _longest(sizes: ModelSizes, kv_tokens: int) -> int:
    return min(kv_tokens, sizes.context_length)


def _scratch_bytes(sizes: ModelSizes, sweep_tokens: int, kv_tokens: int) -> int:
    longest = _longest(sizes, kv_tokens)
    repeated = 2 * longest * sizes.attention_width * sizes.itemsize
    heads = -(-sizes.attention_width // _NARROWEST_HEAD)
    scores = 2 * (heads + sizes.bias_heads) * sweep_tokens * longest * FLOAT32_BYTES
    if sizes.score_heads:
        # Also what `pair_bytes` would count.
        return repeated + _SCORE_COPIES * sizes.score_heads * sweep_tokens * longest * FLOAT32_BYTES
    return min(ATTENTION_SCRATCH_BYTES, repeated + scores) + sizes.pair_bytes * sweep_tokens * longest
