"""Which experts of the layer at hand are there, which are kept near, and which still have to be moved.

Owns the bookkeeping of one acquired piece that came without its experts, and what the counters are told of it. The
streams move the bytes; `expert_cache` keeps some between sweeps; `experts` finds out which are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lamella_engine.expert_cache import ExpertCache
from lamella_engine.experts import ExpertBytes
from lamella_engine.pieces import PlacedPiece
from lamella_engine.placement import Tier
from lamella_engine.timeline import Timeline


class Visit(NamedTuple):
    """Experts that some tokens are routed to: those nobody of the sweep was before, and of these those kept nowhere."""

    first: list[int]
    missing: list[int]


class ExpertFetch:
    """The experts of one piece at a time; every call belongs to the sweep thread.

    Args:
        placed: all pieces in sweep order.
        timeline: told of the bytes that experts take from each tier, and how often they were kept near.
        caches: nearest first; one in RAM serves pieces on disk, one in VRAM all that stream.
    """

    def __init__(self, placed: Sequence[PlacedPiece], timeline: Timeline, caches: Mapping[Tier, ExpertCache]) -> None:
        self._placed = placed
        self._timeline = timeline
        self._caches = dict(caches)
        self._present: set[int] = set()
        self._to_keep: dict[Tier, list[int]] = {}

    def begin(self, number: int) -> None:
        """Piece `number` has come without any."""
        self._present.clear()
        self._count(self._placed[number].tier, -self._own(number).nbytes)

    def bring(self, number: int, experts: Sequence[int], slot: torch.Tensor) -> Visit:
        """Bring those of `experts` that are kept near to their places in `slot`, the whole piece.

        The caller moves what is missing there and says so by `keep`.
        """
        own, tier = self._own(number), self._placed[number].tier
        first = missing = sorted(set(experts) - self._present)
        self._present.update(first)
        self._to_keep.clear()
        hits = {Tier.VRAM: 0, Tier.RAM: 0}
        for near, cache in self._caches.items():
            if near is tier or not missing:
                continue
            wanted, missing = missing, cache.bring(number, own, missing, slot)
            self._to_keep[near] = missing
            hits[near] = len(wanted) - len(missing)
            self._count(near, hits[near] * own.expert_bytes)
        self._count(tier, len(missing) * own.expert_bytes)
        self._timeline.add_experts(len(first), hits[Tier.VRAM], hits[Tier.RAM])
        return Visit(first, missing)

    def keep(self, number: int, slot: torch.Tensor) -> None:
        """All that `bring` found missing is in `slot`: let the caches take of it what they like."""
        for near, fetched in self._to_keep.items():
            self._caches[near].keep(number, self._own(number), fetched, slot)
        self._to_keep.clear()

    def ranges(self, number: int, experts: Sequence[int]) -> list[tuple[int, int]]:
        """Offset and length in the piece of what `experts` need."""
        return self._own(number).ranges(experts)

    def close(self) -> None:
        """Let go of the caches' memory; idempotent."""
        self._caches.clear()

    def _own(self, number: int) -> ExpertBytes:
        experts = self._placed[number].piece.experts
        assert experts is not None, "only pieces with experts come without them"
        return experts

    def _count(self, tier: Tier, nbytes: int) -> None:
        self._timeline.add_sweep_bytes(*(nbytes if tier is each else 0 for each in (Tier.DISK, Tier.RAM, Tier.VRAM)))
