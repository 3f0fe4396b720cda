"""Merges of a byte-pair vocabulary that stores only its pieces and their order.

Owns the one step that both vocabulary formats share. Neighbours: `tiktoken_file`, `sentencepiece_tokenizer`.
"""

from __future__ import annotations

from collections.abc import Mapping


def merges_of(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, pieces of low rank first.

    Both formats join the two neighbours whose union has the lowest rank, however the union came about, so a piece
    that can be made in several ways needs a merge for each.

    Args:
        ranks: piece -> the order in which it is made; pieces that are never made by joining are left out.
    """
    found = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
