"""The engines as the worker sees them: the one narrow interface between the two.

Owns no behaviour. `lamella_engine.Engine` has the shape of one engine, `child_engine.ChildEngine` has it for an engine
in another process, and so has the scripted one of the tests. All engines of a worker are opened and closed together:
`lamella_engine.EngineGroup` is such a set, `local_host` and `child_host` make hosts of sets here and elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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


class ServedEngines(Protocol):
    """The engines of the models that a worker serves at the moment."""

    def find(self, model: str) -> SweepEngine | None:
        """The engine of a model; None where it is not served now."""
        ...

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until engines are open; False if none is after `timeout_s` seconds."""
        ...


class LocalEngine(SweepEngine, Protocol):
    """An engine in this very process.

    `before_sweep` is called before each sweep, in the thread that sweeps; what it raises fails the sweep.
    """

    before_sweep: Callable[[], object]


@dataclass(frozen=True)
class ServedModel:
    """A model by the name that clients know, the name that it is opened as, and its share of the sweeps' time."""

    name: str
    opened_as: str
    share: float = 1.0


class EngineSet(Protocol):
    """Open engines of this very process, by the names that clients know."""

    @property
    def engines(self) -> Mapping[str, LocalEngine]:
        """One a model."""
        ...

    def close(self) -> None:
        """Close all of them; idempotent."""
        ...


@dataclass(frozen=True)
class ChildState:
    """How the engines' process stands.

    Attributes:
        pid: its process id; None while there is none.
        is_ready: its engines are open.
        restarts: times that one was started again.
        max_sequences: sequences that each of its engines runs at most.
        trouble: why the last one ended; None if none has.
        has_failed: none is started any more.
    """

    pid: int | None
    is_ready: bool
    restarts: int
    max_sequences: int
    trouble: str | None
    has_failed: bool


class EngineHost(Protocol):
    """All engines of a worker, wherever they run."""

    @property
    def engines(self) -> Mapping[str, SweepEngine]:
        """One a model, by the names that clients know; the same ones until the host is closed."""
        ...

    @property
    def state(self) -> ChildState | None:
        """How their process stands; None where they have none of their own."""
        ...

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the engines are open; False if they are not after `timeout_s` seconds, or will not be."""
        ...

    def close(self) -> None:
        """Stop the sweeps and free everything; idempotent."""
        ...


OpenHost = Callable[[tuple[ServedModel, ...], Callable[[], bool]], EngineHost]  # the second calls it off
