"""How many experts a sweep visits, and from when on it does better to bring them all. Pure arithmetic."""

from __future__ import annotations

# With more of a layer's experts wanted than this, it is faster brought whole: whole layers are read ahead, while what
# the router chooses is waited for. Measured by `benchmarks.experts`: fetching wins up to 0.66 and loses from 0.68 on.
SPARSE_SHARE = 0.65


def visited_share(count: int, routed: int, tokens: int) -> float:
    """Part of `count` experts that `tokens` tokens visit, `routed` each, if every expert is as likely as any other."""
    return 1.0 - (1.0 - routed / count) ** tokens


def is_sparse(count: int, routed: int, tokens: int) -> bool:
    """Whether a sweep of `tokens` tokens does better to fetch the experts it visits than to bring all of them."""
    return visited_share(count, routed, tokens) <= SPARSE_SHARE
