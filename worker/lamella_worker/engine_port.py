"""The engine as the worker sees it: the one narrow interface between the two.

Owns no behaviour. `lamella_engine.Engine` has this shape; an engine in a child process, or the scripted one of the
tests, has it too. Imported only after the device is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from lamella_engine.sequence_types import EngineCounters, EngineFacts, SequenceRequest, SweepEvents


class SweepEngine(Protocol):
    """Runs sequences in shared sweeps; every method but `events` may be called from any thread."""

    @property
    def facts(self) -> EngineFacts:
        """What the open engine is."""
        ...

    def counters(self) -> EngineCounters:
        """Totals since the engine opened."""
        ...

    def submit(self, request: SequenceRequest) -> None:
        """Take a sequence. Raises SequenceError at once for one that cannot run, EngineClosed after close()."""
        ...

    def cancel(self, sequence_id: str) -> None:
        """End a sequence at the next sweep boundary; unknown ids are ignored."""
        ...

    def events(self, poll_s: float = 0.5) -> Iterator[SweepEvents]:
        """Yield each sweep's events, and an empty batch after `poll_s` seconds of silence, until the engine closes."""
        ...

    def close(self) -> None:
        """Stop the sweeps and free everything; idempotent."""
        ...
