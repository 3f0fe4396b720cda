"""Experts kept between sweeps, in memory that whole layers leave over or that the plan sets aside for them.

A sweep visits layers round and round, so what was used last is what is needed last: the cache keeps the experts that
are visited most often. Owns entries of one size and the count of visits; how bytes are copied is the caller's, so one
form serves host memory and a device. Neighbours: `expert_fetch` asks it, `planner` sizes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy
import torch

from lamella_engine.experts import ExpertBytes

Copy = Callable[[torch.Tensor, torch.Tensor], None]

FORGET_VISITS = 64  # each expert's visits are halved when experts were visited this often on average


class ExpertCache:
    """Entries for the experts of several pieces; every call belongs to the thread that computes.

    Args:
        memory: uint8, as many entries as fit.
        entry_bytes: of the largest expert.
        places: number of the piece and count of experts of each layer that may come without them.
        copy_in, copy_out: copy bytes to an entry and from an entry, before anything computed from there on.
    """

    def __init__(
        self, memory: torch.Tensor, entry_bytes: int, places: Iterable[tuple[int, int]], copy_in: Copy, copy_out: Copy
    ) -> None:
        whole = len(memory) // entry_bytes * entry_bytes
        self._entries = [memory[at : at + entry_bytes] for at in range(0, whole, entry_bytes)]
        self._copy_in, self._copy_out = copy_in, copy_out
        self._visits = {number: numpy.zeros(count) for number, count in places}
        self._num_experts = sum(map(len, self._visits.values()))
        self._since_halved = 0
        self._homes: dict[tuple[int, int], int] = {}  # (piece, expert) -> entry
        self._owners: list[tuple[int, int]] = []  # by entry
        self._entry_visits = numpy.zeros(len(self._entries))  # of each entry's owner

    def __len__(self) -> int:
        """How many experts it can keep."""
        return len(self._entries)

    def bring(self, number: int, own: ExpertBytes, wanted: Sequence[int], slot: torch.Tensor) -> list[int]:
        """Copy those of `wanted` that are kept to their places in `slot`, and count a visit of each; the others."""
        self._count(number, wanted)
        missing = []
        for expert in wanted:
            home = self._homes.get((number, expert))
            if home is None:
                missing.append(expert)
                continue
            for place, part in _parts(own, expert, slot, self._entries[home]):
                self._copy_out(place, part)
        return missing

    def keep(self, number: int, own: ExpertBytes, fetched: Sequence[int], slot: torch.Tensor) -> None:
        """Take in those of `fetched`, now in `slot`, that are visited more often than what they would replace."""
        for expert in fetched:
            home = self._room_for(number, expert)
            if home is None:
                continue
            for place, part in _parts(own, expert, slot, self._entries[home]):
                self._copy_in(part, place)
            self._homes[number, expert] = home
            self._entry_visits[home] = self._visits[number][expert]

    def _room_for(self, number: int, expert: int) -> int | None:
        """An entry that is free, or that of the expert visited least if that is less often than this one."""
        if len(self._owners) < len(self._entries):
            self._owners.append((number, expert))
            return len(self._owners) - 1
        if not self._entries:
            return None
        entry = int(self._entry_visits.argmin())
        if self._entry_visits[entry] >= self._visits[number][expert]:
            return None
        del self._homes[self._owners[entry]]
        self._owners[entry] = number, expert
        return entry

    def _count(self, number: int, experts: Sequence[int]) -> None:
        for expert in experts:
            self._visits[number][expert] += 1
            if (home := self._homes.get((number, expert))) is not None:
                self._entry_visits[home] += 1
        self._since_halved += len(experts)
        if self._since_halved > FORGET_VISITS * self._num_experts:
            self._since_halved = 0
            for visits in (*self._visits.values(), self._entry_visits):
                visits /= 2


def _parts(
    own: ExpertBytes, expert: int, slot: torch.Tensor, entry: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Where each tensor's part of an expert is in a whole piece, and where in an entry."""
    at = 0
    for start, nbytes in own.parts:
        low = start + expert * nbytes
        yield slot[low : low + nbytes], entry[at : at + nbytes]
        at += nbytes
