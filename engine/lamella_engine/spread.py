"""Which layers stay and which stream, spread evenly: pure arithmetic on sizes.

Two rules. What stays is a prefix of one fixed order, smallest first, so that more room never takes anything away; and
layers of equal size then change places until each kind is spread evenly over them. `planner` says how much room there
is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lamella_engine.placement import Tier

_ALIKE = 8  # sizes within an eighth of each other are placed as one kind


@dataclass(frozen=True)
class Room:
    """Bytes of a tier that layers may take, and what each layer would take of them."""

    tier: Tier
    nbytes: int
    costs: tuple[int, ...]


def place_layers(sizes: Sequence[int], rooms: Sequence[Room]) -> tuple[Tier, ...]:
    """The tier of each layer: as many as fit in the first of `rooms`, then in the second, the rest on disk.

    Args:
        sizes: bytes of each layer, in order.
        rooms: in order of preference; none is exceeded by a byte.
    """
    order = [index for kind in _kinds(sizes) for index in kind]
    tiers = [Tier.DISK] * len(sizes)
    position = 0
    for room in rooms:
        left = room.nbytes
        while position < len(order) and room.costs[order[position]] <= left:
            left -= room.costs[order[position]]
            tiers[order[position]] = room.tier
            position += 1
    for kind in _kinds(sizes):
        if len({(sizes[index], *(room.costs[index] for room in rooms)) for index in kind}) == 1:
            _spread_kind(tiers, sorted(kind), [room.tier for room in rooms])
    return tuple(tiers)


def evenly(chosen: int, total: int) -> tuple[bool, ...]:
    """Mark `chosen` of `total` places so that the gaps, also the one across the end, differ by one at most."""
    half = total // 2
    return tuple((place * chosen + chosen + half) // total > (place * chosen + half) // total for place in range(total))


def _kinds(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Groups of layers of about the same size, smallest first; each in an order whose every beginning is spread."""
    ascending = sorted(range(len(sizes)), key=lambda index: (sizes[index], index))
    start = 0
    while start < len(ascending):
        limit = sizes[ascending[start]] * (_ALIKE + 1) // _ALIKE
        end = start
        while end < len(ascending) and sizes[ascending[end]] <= limit:
            end += 1
        kind = sorted(ascending[start:end])
        yield [kind[place] for place in _scattered(len(kind))]
        start = end


def _scattered(count: int) -> list[int]:
    """0 to `count` - 1 by their bits read backwards, so that no stretch of the result leaves a wide gap."""
    width = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda place: int(f"{place:0{width}b}"[::-1], 2))


def _spread_kind(tiers: list[Tier], kind: list[int], order: list[Tier]) -> None:
    """Exchange the tiers of equal layers: each tier of `order` is spread over those that earlier ones left.

    What streams is spread over what stays, and within it what comes from disk over what waits in memory.
    """
    left = kind
    for tier in order:
        marks = evenly(sum(tiers[index] is tier for index in left), len(left)) if left else ()
        keep = [index for index, is_here in zip(left, marks, strict=True) if not is_here]
        others = [tiers[index] for index in left if tiers[index] is not tier]
        for index, is_here in zip(left, marks, strict=True):
            if is_here:
                tiers[index] = tier
        for index, other in zip(keep, others, strict=True):
            tiers[index] = other
        left = keep
