"""Bytes in words, for people; figures for programs stay whole numbers of bytes."""

from __future__ import annotations

_STEP = 1024
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def byte_size(nbytes: int) -> str:
    """`nbytes` in the largest unit that leaves at least 1, such as ``98.3 MiB``."""
    value = float(nbytes)
    for unit in _UNITS[:-1]:
        if abs(value) < _STEP:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= _STEP
    return f"{value:.1f} {_UNITS[-1]}"
