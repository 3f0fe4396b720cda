"""Waiting for a condition under a deadline, instead of sleeping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], deadline_s: float = 40.0, every_s: float = 0.02) -> T:
    """Return the first truthy value of `condition`; fail after `deadline_s`."""
    deadline = time.monotonic() + deadline_s
    pause = threading.Event()
    while not (value := condition()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"not true within {deadline_s:g} s: {condition!r}")
        pause.wait(every_s)
    return value
