"""What an operation asks of the server, as values: the seam between what is said and how it is sent.

An `Operation` is a generator: it yields steps, is sent their raw answers and returns its result. The synchronous and
the asyncio connection drive the same operations, so each exchange is written once. Every step may be repeated when its
answer was lost.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, TypeVar

from lamella.errors import DecodeError
from lamella.script_call import ScriptCall

Result = TypeVar("Result")


class Commands(NamedTuple):
    """Redis commands that run as one transaction; the answer is the list of their answers."""

    commands: tuple[tuple[str | int, ...], ...]


Step = ScriptCall[object] | Commands
Operation = Generator[Step, object, Result]


def commands(*each: tuple[str | int, ...]) -> Commands:
    """Return a transaction of the given commands."""
    return Commands(each)


def answers(raw: object) -> list[object]:
    """Return the answers of a transaction as a list."""
    if not isinstance(raw, list):
        raise DecodeError(f"the server answered a transaction with {type(raw).__name__}; a list belongs there")
    return raw
