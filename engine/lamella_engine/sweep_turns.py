"""Whose sweep is next where several engines share a thread: the one that has used the least, by its share.

Owns the rule and no clock: callers say who wants a turn and how many seconds one took. Start-time fair queueing: each
engine has a virtual time that its sweeps move on by seconds / share; the least of those that want goes next. Who wants
nothing is passed over, and begins again at the virtual time of whoever went last, so that idling earns no credit.
`engine_group` asks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping


class SweepTurns:
    """The turns of engines known by name; used by one thread.

    Args:
        shares: of each engine, above 0; one of 2.0 gets twice the seconds of one of 1.0 while both want turns.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        assert all(share > 0 for share in shares.values()), "a share is above 0"
        self._shares = dict(shares)
        self._virtual_s = dict.fromkeys(shares, 0.0)
        self._now_s = 0.0
        self._wanting: frozenset[str] = frozenset()

    def next(self, wanting: Collection[str]) -> str | None:
        """Who of `wanting` goes next, of equals the one named first at the start; None if nobody wants."""
        for name in wanting:
            if name not in self._wanting:
                self._virtual_s[name] = max(self._virtual_s[name], self._now_s)
        self._wanting = frozenset(wanting)
        if not self._wanting:
            return None
        chosen = min((name for name in self._shares if name in self._wanting), key=self._virtual_s.__getitem__)
        self._now_s = self._virtual_s[chosen]
        return chosen

    def charge(self, name: str, seconds: float) -> None:
        """The turn of `name` took so long."""
        self._virtual_s[name] += seconds / self._shares[name]
