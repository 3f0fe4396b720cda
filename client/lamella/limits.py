"""What may wait and run: limits of models and users, kept on the server so that every client meets the same ones.

Owns their types and how they are read and set; ``lua/submit.lua`` and ``lua/_dispatch.lua`` hold jobs to them. A change
counts from the next submit or dispatch on; what was accepted stays. Neighbours: `client`, the command `lamella limits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, TypeVar

from pydantic import Field, ValidationError

from lamella.errors import DecodeError, RequestError
from lamella.keys import MAX_QUEUED, Keys
from lamella.messages import Wire
from lamella.queue_terms import check_user
from lamella.steps import Operation, answers, commands


class Limits(Wire):
    """Limits that hold for every model, and for every user at one model; None is no limit.

    `user_running` counts jobs sent to workers; `user_tokens` what all of a user's jobs, waiting and running, are
    estimated to take: prompts and max_tokens.
    """

    model_queued: int = Field(default=MAX_QUEUED, ge=0)
    user_queued: int | None = Field(default=None, ge=0)
    user_running: int | None = Field(default=None, ge=0)
    user_tokens: int | None = Field(default=None, ge=0)


class UserLimits(Wire):
    """One user's own limits, in place of everybody's where not None, and the weight of their share."""

    weight: float = Field(default=1.0, ge=0.01, le=100.0)
    queued: int | None = Field(default=None, ge=0)
    running: int | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=0)


class LimitChanges(TypedDict, total=False):
    """What to change of `Limits`; None takes a limit away (of `model_queued`: back to the default)."""

    model_queued: int | None
    user_queued: int | None
    user_running: int | None
    user_tokens: int | None


class UserLimitChanges(TypedDict, total=False):
    """What to change of `UserLimits`; None: as for everybody."""

    weight: float | None
    queued: int | None
    running: int | None
    tokens: int | None


Kind = TypeVar("Kind", Limits, UserLimits)


def limits(keys: Keys) -> Operation[Limits]:
    """Return the limits that hold for all."""
    return (yield from _read(keys.limits, Limits))


def user_limits(keys: Keys, user: str) -> Operation[UserLimits]:
    """Return a user's own limits and weight."""
    return (yield from _read(keys.user_limits(check_user(user)), UserLimits))


def set_limits(keys: Keys, changes: Mapping[str, object]) -> Operation[Limits]:
    """Change the limits given and return all of them.

    Raises:
        RequestError: a limit is unknown, or no whole number from 0 on.
    """
    return (yield from _change(keys.limits, Limits, changes))


def set_user_limits(keys: Keys, user: str, changes: Mapping[str, object]) -> Operation[UserLimits]:
    """Change what is given of a user's own limits and return all of them.

    Raises:
        RequestError: a limit is unknown or out of range, or the user's name is unusable.
    """
    return (yield from _change(keys.user_limits(check_user(user)), UserLimits, changes))


def _read(key: str, kind: type[Kind]) -> Operation[Kind]:
    names: tuple[str, ...] = tuple(kind.model_fields)
    raw = yield commands(("HMGET", key, *names))
    held = zip(names, answers(answers(raw)[0]), strict=True)
    try:
        return kind.model_validate({name: str(value) for name, value in held if value is not None})
    except ValidationError as error:
        raise DecodeError(f"the limits under {key} are malformed: {error.errors()[0]['msg']}") from error


def _change(key: str, kind: type[Kind], changes: Mapping[str, object]) -> Operation[Kind]:
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        checked = kind.model_validate(given, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        known = ", ".join(kind.model_fields)
        raise RequestError(f"limit {name} is {first['input']!r}: {first['msg']}; the limits are {known}") from error
    if unknown := [name for name in changes if name not in kind.model_fields]:
        raise RequestError(f"there is no limit {unknown[0]!r}; the limits are {', '.join(kind.model_fields)}")
    values: dict[str, object] = checked.model_dump(include=set(given))
    steps: list[tuple[str | int, ...]] = []
    if values:
        steps.append(("HSET", key, *(part for name, value in values.items() for part in (name, str(value)))))
    removed: list[str] = [name for name, value in changes.items() if value is None]
    if removed:
        steps.append(("HDEL", key, *removed))
    if steps:
        yield commands(*steps)
    return (yield from _read(key, kind))
