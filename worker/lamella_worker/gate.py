"""Lets jobs into the engine: many together, or one alone after a lost attempt.

Owns the order of entry only. A job whose earlier attempt ended with a dead engine or a failed sweep may be the cause;
from then on it shares the engine with nobody, so that it cannot take others down with it and they cannot use up its
attempts. Which jobs these are is `session`'s to say. Jobs that wait for the engine to be free go before newcomers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_S = 0.2


class Gate:
    """A lock with shared and exclusive entry whose waits can be called off."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_exclusive = False
        self._exclusive_waiting = 0

    @contextmanager
    def pass_through(self, *, is_alone: bool, is_called_off: Callable[[], bool]) -> Iterator[bool]:
        """Be inside for the time of the block; yields False if the wait was called off, and then is not inside."""
        has_entered = self._enter_alone(is_called_off) if is_alone else self._enter(is_called_off)
        try:
            yield has_entered
        finally:
            if has_entered:
                with self._changed:
                    self._inside -= 1
                    self._is_exclusive = False
                    self._changed.notify_all()

    def _enter(self, is_called_off: Callable[[], bool]) -> bool:
        with self._changed:
            while self._is_exclusive or self._exclusive_waiting:
                if is_called_off():
                    return False
                self._changed.wait(LOOK_S)
            self._inside += 1
        return True

    def _enter_alone(self, is_called_off: Callable[[], bool]) -> bool:
        with self._changed:
            self._exclusive_waiting += 1
            try:
                while self._inside:
                    if is_called_off():
                        return False
                    self._changed.wait(LOOK_S)
                self._inside, self._is_exclusive = 1, True
            finally:
                self._exclusive_waiting -= 1
                self._changed.notify_all()
        return True
