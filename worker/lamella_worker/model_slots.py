"""How many messages of each model are in hand, so that no model takes the places of another.

Owns the count. A message waits here, its job unclaimed, until one of its model's slots is free; and a model that has
one waiting already is named in `full`, where the broker's `transport` looks which queues it leaves alone meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lamella.keys import queue_name

READY = 1  # messages of a model that may wait for its next free slot
LOOK_S = 0.2


def celery_concurrency(slots: int, num_models: int) -> int:
    """Threads for all models: a slot each, and where there are several models one for each that waits for its slot."""
    return slots if num_models == 1 else num_models * (slots + READY)


class ModelSlots:
    """Places for jobs, so many for each model; safe to use from any thread.

    Attributes:
        full: names of the queues that are to be left alone now; one list for the life of this object.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._changed = threading.Condition()
        self._in_hand: Counter[str] = Counter()
        self._running: Counter[str] = Counter()
        self.full: list[str] = []

    @contextmanager
    def place(self, model: str, timeout_s: float, is_called_off: Callable[[], bool]) -> Iterator[bool]:
        """Have a slot of `model` for the time of the block; yields False if none was free in time."""
        self._count(model, 1)
        try:
            has_place = self._enter(model, time.monotonic() + timeout_s, is_called_off)
            try:
                yield has_place
            finally:
                if has_place:
                    with self._changed:
                        self._running[model] -= 1
                        self._changed.notify_all()
        finally:
            self._count(model, -1)

    def _enter(self, model: str, deadline: float, is_called_off: Callable[[], bool]) -> bool:
        with self._changed:
            while self._running[model] >= self._slots:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or is_called_off():
                    return False
                self._changed.wait(min(left_s, LOOK_S))
            self._running[model] += 1
        return True

    def _count(self, model: str, change: int) -> None:
        queue = queue_name(model)
        with self._changed:
            self._in_hand[model] += change
            is_full = self._in_hand[model] >= self._slots + READY
            if is_full and queue not in self.full:
                self.full.append(queue)
            elif not is_full and queue in self.full:
                self.full.remove(queue)
            if not self._in_hand[model]:
                del self._in_hand[model]
