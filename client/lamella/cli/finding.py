"""What a check of `lamella doctor` found: good, worth knowing, or broken, with what to do."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Level(Enum):
    """How bad it is; only BROKEN makes the command fail."""

    GOOD = "ok"
    NOTE = "note"
    BROKEN = "BROKEN"


class Finding(NamedTuple):
    """One line of the report; `fix` is empty where there is nothing to do."""

    level: Level
    what: str
    fix: str = ""


def good(what: str) -> Finding:
    """Return a finding without a fix."""
    return Finding(Level.GOOD, what)


def note(what: str, fix: str) -> Finding:
    """Return something that works, but could be better."""
    return Finding(Level.NOTE, what, fix)


def broken(what: str, fix: str) -> Finding:
    """Return something that does not work."""
    return Finding(Level.BROKEN, what, fix)
