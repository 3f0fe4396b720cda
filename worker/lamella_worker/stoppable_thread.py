"""A thread that its owner starts and stops; `heartbeat` and `lease_keeper` each own one."""

from __future__ import annotations

import threading
from collections.abc import Callable


class StoppableThread:
    """Runs `work`, which is given the event that asks it to end."""

    def __init__(self, name: str, work: Callable[[threading.Event], None]) -> None:
        self._asked = threading.Event()
        self._thread = threading.Thread(target=work, args=(self._asked,), name=name, daemon=True)

    def start(self) -> None:
        """Start the work."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ask the work to end, and wait at most `timeout_s` seconds for it; harmless if it was never started."""
        self._asked.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
