"""In which order the lines of a window are asked: those expected to take longest first.

A job that is long and starts last keeps one slot busy while the others stand empty; started first, the short ones fill
up beside it. Lines that are expected to take about as long stay in the order of the input, so that its answers can be
written soon. Owns the order only; the output keeps that of the input (`map_run`). Does no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

STEPS = 3  # classes of length for each doubling


class Asked(Protocol):
    """What the order looks at."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer, as estimated; at least 1."""


Line = TypeVar("Line", bound=Asked)


def ordered(lines: Sequence[Line]) -> list[Line]:
    """Return the lines of a window in the order in which they are asked."""
    return sorted(lines, key=lambda line: -math.floor(STEPS * math.log2(line.num_tokens)))
