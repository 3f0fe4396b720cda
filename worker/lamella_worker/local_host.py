"""Engines in the worker's own process, as a host.

Owns nothing but that they are always ready. `open_engine` opens them; `child_host` is the other kind of host.
"""

from __future__ import annotations

from collections.abc import Mapping

from lamella_worker.engine_port import ChildState, EngineSet, SweepEngine


class LocalHost:
    """Engines that are open from when they are made until `close`."""

    def __init__(self, opened: EngineSet) -> None:
        self._opened = opened

    @property
    def engines(self) -> Mapping[str, SweepEngine]:
        """One a model."""
        return self._opened.engines

    @property
    def state(self) -> ChildState | None:
        """None: they have no process of their own."""
        return None

    def wait_ready(self, timeout_s: float) -> bool:
        """True, at once."""
        return True

    def close(self) -> None:
        """Close all engines; idempotent.

        Raises:
            EngineError: a sweep does not end.
        """
        self._opened.close()
