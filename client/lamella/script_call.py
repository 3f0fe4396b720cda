"""One call of a registry script as a value, and how to read what a script answers.

Owns the scripts' names and texts, the two arguments that all of them begin with, calls that go as one, and the checks
of replies. What each script is told and answers is in `registry_calls` and `queue_calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from itertools import groupby
from typing import Generic, TypeVar

from lamella.errors import DecodeError
from lamella.keys import Keys

BASE = "_base"  # before each script; and before those that touch the queue, in this order:
QUEUE_PARTS = ("_queue", "_message", "_end", "_dispatch")
APPEND = "_append"  # after those, for scripts that store a job's events
OUTLOOK = "_outlook"  # after those, for scripts that estimate: what a script does not call still costs it time

APPENDING = ("emit", "end")
ESTIMATING = ("submit", "outlook")
ALONE = ("emit", "admit", "attach", "settle")  # scripts that do not touch the queue

_SHARED = 2  # arguments that every script begins with
_ANSWERS = {"emit": 2}  # scripts that take several calls as one: so many items of the answer are each call's

Reply_co = TypeVar("Reply_co", covariant=True)
Reply = TypeVar("Reply")
Member = TypeVar("Member", bound=StrEnum)


class ScriptName(StrEnum):
    """The scripts, named after their files in ``lua/``."""

    SUBMIT = "submit"
    CLAIM = "claim"
    EMIT = "emit"
    END = "end"
    RELEASE = "release"
    NUDGE = "nudge"
    CANCEL = "cancel"
    RETRY = "retry"
    SERVE = "serve"
    TEND = "tend"
    EXPIRE = "expire"
    OUTLOOK = "outlook"
    ADMIT = "admit"
    ATTACH = "attach"
    SETTLE = "settle"


@dataclass(frozen=True)
class ScriptCall(Generic[Reply_co]):
    """One call of a script, ready for EVALSHA.

    Attributes:
        script: which script.
        keys: its KEYS, in order.
        args: its ARGV, in order.
        decode: turns Redis's answer into the call's reply type; raises DecodeError.
    """

    script: ScriptName
    keys: tuple[str, ...]
    args: tuple[str | int, ...]
    decode: Callable[[object], Reply_co]


@cache
def script_source(name: ScriptName) -> str:
    """Return the Lua text of a script: the parts that it shares with others, and its own."""
    folder = resources.files("lamella").joinpath("lua")
    queue = () if name.value in ALONE else QUEUE_PARTS
    append = (APPEND,) if name.value in APPENDING else ()
    outlook = (OUTLOOK,) if name.value in ESTIMATING else ()
    parts = (BASE, *queue, *append, *outlook, name.value)
    return "\n".join(folder.joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in parts)


def script_call(
    name: ScriptName,
    keys: Keys,
    named: tuple[str, ...],
    args: tuple[str | int, ...],
    decode: Callable[[object], Reply],
) -> ScriptCall[Reply]:
    """Return a call whose arguments begin with what every script is told: the prefix and how long ended jobs stay."""
    return ScriptCall(name, named, (keys.prefix, keys.finished_ttl_s, *args), decode)


def join_calls(calls: Iterable[ScriptCall[Reply]]) -> Iterator[tuple[ScriptCall[Reply], ...]]:
    """Yield the calls in order, those together that may go as one (`joined_words`)."""
    for name, run in groupby(calls, key=lambda call: call.script):
        if may_be_joined(name):
            yield tuple(run)
        else:
            yield from ((call,) for call in run)


def may_be_joined(name: ScriptName) -> bool:
    """Whether several calls of this script may go as one."""
    return name.value in _ANSWERS


def joined_words(calls: Sequence[ScriptCall[Reply]]) -> tuple[str | int, ...]:
    """Return what follows the script's name in EVALSHA: one call's keys and arguments, or those of several as one."""
    names = [key for call in calls for key in call.keys]
    own = [arg for call in calls for arg in call.args[_SHARED:]]
    return (len(names), *names, *calls[0].args[:_SHARED], *own)


def parted_answer(calls: Sequence[ScriptCall[Reply]], raw: object) -> list[object]:
    """Return each call's part of what Redis answered to all of them as one; an error is everybody's."""
    each = _ANSWERS.get(calls[0].script.value, 0)
    if isinstance(raw, list) and len(raw) == each * len(calls) > 0:
        return [raw[place : place + each] for place in range(0, len(raw), each)]
    return [raw] * len(calls)


def read_member(kind: type[Member], raw: object) -> Member:
    """Return the member of a closed set that a script named; raises DecodeError."""
    try:
        return kind(read_text(raw))
    except ValueError as error:
        raise DecodeError(f"a script answered {raw!r}, which is no {kind.__name__} this version knows") from error


def read_items(raw: object, script: str, count: int) -> list[object]:
    """Return the first `count` items of a script's list; raises DecodeError."""
    if not isinstance(raw, list) or len(raw) < count:
        what = f"{len(raw)} items" if isinstance(raw, list) else type(raw).__name__  # what is in them may be a prompt
        raise DecodeError(f"the {script} script answered {what}, which this version does not read")
    return raw[:count]


def read_text(raw: object) -> str:
    """Return text that came as text or bytes; raises DecodeError."""
    if isinstance(raw, bytes):
        return raw.decode()
    if isinstance(raw, str):
        return raw
    raise DecodeError(f"a script answered {raw!r} where text belongs")


def read_integer(raw: object) -> int:
    """Return a whole number; raises DecodeError."""
    if isinstance(raw, int):
        return raw
    raise DecodeError(f"a script answered {raw!r} where a whole number belongs")
