"""What keys, values and workspace take of the compute device before layers get any of it.

Pure arithmetic. Each takes a share of the budget, no less than its floor and no more than is wished for; what one
byte more of budget adds to both together is less than a byte, so that layers never lose by a larger budget. What is
left over once the layers are placed, `enlarge` gives to the two as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lamella_engine.kv_cache import PAGE_TOKENS
from lamella_engine.placement import ModelSizes
from lamella_engine.workspace import gather_bytes, graph_bytes, sweep_bytes

MIB = 1024**2
KV_TOKENS_PER_SEQUENCE = 2048
MIN_SWEEP_TOKENS = 64
MAX_SWEEP_TOKENS = 4096
_KV_SHARE = 8  # keys and values may have an eighth of the budget unless they are asked for
_WORKSPACE_SHARE = 16  # and the workspace a sixteenth, beside what graphs take
_WHOLE_SHARE = 4  # or a quarter, where a sweep must carry a whole prompt

# The allocator of a GPU takes large blocks from the driver by whole pages of 2 MiB, smaller ones in shared segments: of
# 20 MiB above 1 MiB, else of 2 MiB.
_SEGMENT_BYTES = 2 * MIB
_SHARED_BYTES = 20 * MIB
_LARGE_BYTES = 10 * MIB
_MEDIUM_BYTES = MIB
_SMALL_BYTES = 512


@dataclass(frozen=True)
class Wishes:
    """What was asked for; None where it is to be derived. `on_card`: a GPU computes, its allocator and graphs count."""

    max_sequences: int
    kv_tokens: int | None
    sweep_tokens: int | None
    on_card: bool = False


@dataclass(frozen=True)
class Reserve:
    """What is set aside: `nbytes` in all, of which the cache and the workspace are to use no more than they say."""

    nbytes: int
    kv_tokens: int
    kv_bytes: int
    sweep_tokens: int
    workspace_bytes: int


def device_bytes(nbytes: int) -> int:
    """What an allocation of `nbytes` bytes takes of a GPU."""
    unit = _SEGMENT_BYTES if nbytes >= _LARGE_BYTES else _SMALL_BYTES
    return -(-nbytes // unit) * unit


def smallest(sizes: ModelSizes, wishes: Wishes) -> int:
    """Bytes below which nothing can be reserved."""
    return _kv_cost(sizes, wishes, _kv_floor(sizes, wishes)) + _sweep_cost(sizes, wishes, _sweep_floor(wishes))


def reserve(sizes: ModelSizes, wishes: Wishes, budget: int, base: int, sweep_limit: int) -> Reserve | None:
    """Share `budget`, of which `base` bytes are taken; None if the floors do not fit.

    Args:
        sizes: of the model.
        wishes: as asked for.
        budget: bytes of the compute device.
        base: bytes of the leanest layout.
        sweep_limit: tokens of a sweep that are worth having, where they are not asked for.
    """
    kv_floor, kv_wanted = _kv_floor(sizes, wishes), _kv_wanted(sizes, wishes)
    sweep_floor = _sweep_floor(wishes)
    sweep_wanted = _sweep_wanted(sizes, wishes, sweep_limit)
    workspace_share = _WHOLE_SHARE if sizes.reads_whole else _WORKSPACE_SHARE
    least_kv, least_sweep = _kv_cost(sizes, wishes, kv_floor), _sweep_cost(sizes, wishes, sweep_floor)
    spare = budget - base - least_kv - least_sweep
    if spare < 0:
        return None
    for_kv = min(_kv_cost(sizes, wishes, kv_wanted), max(least_kv, min(budget // _KV_SHARE, least_kv + spare)))
    spare -= for_kv - least_kv
    for_sweep = min(
        _sweep_cost(sizes, wishes, sweep_wanted),
        max(least_sweep, min(budget // workspace_share + _graph_cost(sizes, wishes), least_sweep + spare)),
    )
    kv_tokens = _most_kv(sizes, wishes, kv_floor, for_kv)
    sweep_tokens = _most_sweep(sizes, wishes, sweep_floor, sweep_wanted, for_sweep)
    return _settled(sizes, wishes, kv_tokens, sweep_tokens, for_kv + for_sweep)


def enlarge(sizes: ModelSizes, wishes: Wishes, settled: Reserve, spare: int, sweep_limit: int) -> Reserve:
    """`settled` with up to `spare` bytes more, as far as more is wished for: half for the cache, then for the sweep.

    What the sweep cannot use goes to the cache after all. Arguments as of `reserve`; the result takes what it uses.
    """
    least_kv = _kv_cost(sizes, wishes, settled.kv_tokens)
    room = least_kv + _sweep_cost(sizes, wishes, settled.sweep_tokens) + max(0, spare)
    kv_tokens = _most_kv(sizes, wishes, settled.kv_tokens, least_kv + max(0, spare) // 2)
    for_sweep = room - _kv_cost(sizes, wishes, kv_tokens)
    wanted = _sweep_wanted(sizes, wishes, sweep_limit)
    sweep_tokens = _most_sweep(sizes, wishes, settled.sweep_tokens, wanted, for_sweep)
    kv_tokens = _most_kv(sizes, wishes, kv_tokens, room - _sweep_cost(sizes, wishes, sweep_tokens))
    used = _kv_cost(sizes, wishes, kv_tokens) + _sweep_cost(sizes, wishes, sweep_tokens)
    return _settled(sizes, wishes, kv_tokens, sweep_tokens, used)


def most_kv_tokens(sizes: ModelSizes, wishes: Wishes, room: int) -> int:
    """Tokens of cache that could be asked for in `room` bytes, beside the smallest workspace; 0 if none."""
    wanted = _kv_wanted(sizes, wishes) // PAGE_TOKENS

    def fits(pages: int) -> bool:
        wish = replace(wishes, kv_tokens=max(1, pages) * PAGE_TOKENS)
        return pages == 0 or smallest(sizes, wish) <= room

    return _largest(0, wanted, fits) * PAGE_TOKENS


def _kv_floor(sizes: ModelSizes, wishes: Wishes) -> int:
    """One sequence of a useful length, in whole pages; what was asked for is its own floor."""
    return _pages(wishes.kv_tokens or min(KV_TOKENS_PER_SEQUENCE, sizes.context_length))


def _kv_wanted(sizes: ModelSizes, wishes: Wishes) -> int:
    each = min(KV_TOKENS_PER_SEQUENCE, sizes.context_length)
    return _pages(wishes.kv_tokens or wishes.max_sequences * each)


def _sweep_floor(wishes: Wishes) -> int:
    return wishes.sweep_tokens or max(MIN_SWEEP_TOKENS, wishes.max_sequences)


def _sweep_wanted(sizes: ModelSizes, wishes: Wishes, sweep_limit: int) -> int:
    useful = max(sweep_limit, sizes.context_length + wishes.max_sequences) if sizes.reads_whole else sweep_limit
    return wishes.sweep_tokens or max(_sweep_floor(wishes), min(useful, MAX_SWEEP_TOKENS))


def _most_kv(sizes: ModelSizes, wishes: Wishes, least: int, room: int) -> int:
    """Tokens of cache, in whole pages, that cost at most `room` bytes; `least` do."""

    def fits(pages: int) -> bool:
        return _kv_cost(sizes, wishes, pages * PAGE_TOKENS) <= room

    return _largest(least // PAGE_TOKENS, _kv_wanted(sizes, wishes) // PAGE_TOKENS, fits) * PAGE_TOKENS


def _most_sweep(sizes: ModelSizes, wishes: Wishes, least: int, most: int, room: int) -> int:
    """Tokens of a sweep, `most` at most, that cost at most `room` bytes; `least` do."""
    return _largest(least, most, lambda count: _sweep_cost(sizes, wishes, count) <= room)


def _settled(sizes: ModelSizes, wishes: Wishes, kv_tokens: int, sweep_tokens: int, nbytes: int) -> Reserve:
    kv_bytes = kv_tokens * sizes.kv_bytes_per_token
    workspace = _sweep_cost(sizes, wishes, sweep_tokens) + _kv_cost(sizes, wishes, kv_tokens) - kv_bytes
    return Reserve(nbytes, kv_tokens, kv_bytes, sweep_tokens, workspace)


def _pages(tokens: int) -> int:
    return max(1, -(-tokens // PAGE_TOKENS)) * PAGE_TOKENS


def _kv_cost(sizes: ModelSizes, wishes: Wishes, tokens: int) -> int:
    gathered = gather_bytes(sizes, wishes.max_sequences, tokens)
    return tokens * sizes.kv_bytes_per_token + gathered + (_kv_rounding(sizes, tokens) if wishes.on_card else 0)


def _kv_rounding(sizes: ModelSizes, tokens: int) -> int:
    """What the allocator of a GPU adds to the two pools of each layer."""
    pools = 2 * len(sizes.layers)
    each = device_bytes(-(-tokens * sizes.kv_bytes_per_token // pools))
    segment = _SEGMENT_BYTES if each <= _MEDIUM_BYTES else _SHARED_BYTES
    taken = pools * each if each >= _LARGE_BYTES else -(-pools // (segment // each)) * segment
    return max(0, taken - tokens * sizes.kv_bytes_per_token)


def _sweep_cost(sizes: ModelSizes, wishes: Wishes, tokens: int) -> int:
    """As if the whole cache that is wished for could be had, so that it does not depend on the budget."""
    cache = _kv_wanted(sizes, wishes)
    return sweep_bytes(sizes, tokens, wishes.max_sequences, cache) + _graph_cost(sizes, wishes)


def _graph_cost(sizes: ModelSizes, wishes: Wishes) -> int:
    return graph_bytes(sizes, wishes.max_sequences, _kv_wanted(sizes, wishes)) if wishes.on_card else 0


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `low` to `high` that fits; `low` does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
