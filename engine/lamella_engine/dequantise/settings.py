"""The quantisation settings of a config, read value by value: a value of the wrong kind is refused, never guessed.

Neighbours: `methods` finds the settings, the formats read what they need.
"""

from __future__ import annotations

from collections.abc import Mapping

from lamella_engine.errors import UnsupportedModel

Settings = Mapping[str, object]


def refused(
    what: str, way_out: str = "use the model's unquantised checkpoint, or another quantisation of it"
) -> UnsupportedModel:
    """The error for settings that are not understood: what, and what to do instead."""
    return UnsupportedModel(f"this quantised checkpoint cannot be expanded: {what}; {way_out}")


def whole(settings: Settings, *keys: str, default: int | None = None) -> int:
    """The whole number under the first of `keys` that is there.

    Raises:
        UnsupportedModel: it is not a whole number, or not there and without `default`.
    """
    value = _first(settings, keys)
    if value is None:
        value = default
    if type(value) is not int:
        raise refused(f"its setting {keys[0]!r} is {value!r}, not a whole number")
    return value


def text(settings: Settings, *keys: str, default: str = "") -> str:
    """The text under the first of `keys` that is there, in lower case."""
    value = _first(settings, keys)
    if value is None:
        value = default
    if not isinstance(value, str):
        raise refused(f"its setting {keys[0]!r} is {value!r}, not text")
    return value.lower()


def flag(settings: Settings, key: str, *, default: bool = False) -> bool:
    """The truth value under `key`."""
    value = settings.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise refused(f"its setting {key!r} is {value!r}, not true or false")
    return value


def section(settings: Settings, key: str) -> Settings:
    """The object under `key`; empty if it is not there."""
    value = settings.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise refused(f"its setting {key!r} is {value!r}, not an object")
    return value


def texts(settings: Settings, key: str) -> tuple[str, ...]:
    """The list of texts under `key`; empty if it is not there."""
    value = settings.get(key)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise refused(f"its setting {key!r} is {value!r}, not a list of texts")
    return tuple(value)


def block_size(settings: Settings, key: str) -> tuple[int, int] | None:
    """Rows and columns of a block under `key`; None if it is not there."""
    value = settings.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        value = [int(side) if side.isdecimal() else side for side in value.split("x")]
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(type(side) is int and side > 0 for side in value)
    ):
        raise refused(f"its setting {key!r} is {value!r}, not two positive numbers")
    return value[0], value[1]


def _first(settings: Settings, keys: tuple[str, ...]) -> object:
    return next((settings[key] for key in keys if settings.get(key) is not None), None)
