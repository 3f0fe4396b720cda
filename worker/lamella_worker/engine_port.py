"""The engine as the worker sees it: the one narrow interface between the two.

Owns no behaviour. `lamella_engine.Engine` has this shape, `child_engine.ChildEngine` has it for an engine in a process
of its own, and so has the scripted one of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from lamella_engine.errors import EngineError
from lamella_engine.sequence_types import EngineCounters, EngineFacts, SequenceRequest, SweepEvents

ENGINE_ERROR = "engine"  # the code of a sequence that failed inside a sweep, through no fault of its own
CREDIT = 2  # sweeps whose events an engine process may send ahead of what was taken


class EngineAway(EngineError):
    """The engine's process is being started again; what was asked may be asked again later."""


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
        """Take a sequence.

        Raises SequenceError at once for one that cannot run, EngineClosed after close(), EngineAway where it was not
        even looked at.
        """
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


class LocalEngine(SweepEngine, Protocol):
    """An engine in this very process.

    `before_sweep` is called before each sweep, in the thread that sweeps; what it raises fails the sweep.
    """

    before_sweep: Callable[[], object]
