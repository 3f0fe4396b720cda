"""How work on a model reports its progress: one call per step, from the thread that asked for the work."""

from __future__ import annotations

from typing import Final, Protocol

FETCH: Final = "fetch from a peer"
DOWNLOAD: Final = "download"
BUILD: Final = "build"
CONVERT: Final = "convert"
TRY_PACKING: Final = "try packing"
CHECK: Final = "check"
MEASURE: Final = "measure"  # counts tokens instead of bytes


class Progress(Protocol):
    """Called with the bytes done so far and in all of one phase; `done_bytes` never falls within a phase."""

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """`phase` is one of the constants above; must be quick, and whatever it raises ends the work."""


def silent(phase: str, done_bytes: int, total_bytes: int) -> None:
    """Report to nobody."""
