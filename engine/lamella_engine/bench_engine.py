"""The engine that `bench` measures: listened to sweep by sweep, its model at hand.

Owns what needs both at once: what expanding takes is measured on the model, in the thread that sweeps, before a sweep
of one token. `bench` owns what is decoded and the figures made of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from lamella_engine.engine import Engine
from lamella_engine.errors import EngineError, SequenceError
from lamella_engine.expansion_times import ExpansionTimes
from lamella_engine.sequence_types import (
    FinishReason,
    Sampling,
    SequenceEvent,
    SequenceFinished,
    SequenceRequest,
)

SILENCE_S = 900.0  # a sweep that takes longer is taken for a hang
_POLL_S = 1.0
_PROBE = "bench-expansion"


@dataclass(frozen=True)
class BenchEngine:
    """An engine, closed by whoever opened it."""

    engine: Engine

    def batches(self) -> Iterator[tuple[SequenceEvent, ...]]:
        """What each sweep brings.

        Raises:
            EngineError: the engine ended, or brings nothing any more.
        """
        deadline = time.monotonic() + SILENCE_S
        for batch in self.engine.events(poll_s=_POLL_S):
            if batch.events:
                yield batch.events
                deadline = time.monotonic() + SILENCE_S
            elif time.monotonic() > deadline:
                raise EngineError(f"no sweep ended within {SILENCE_S:.0f} s; a disk or a device hangs")
        raise EngineError("the engine was closed while it was measured")

    def expansion_times(self) -> ExpansionTimes:
        """What expanding takes in a sweep; the engine has nothing to do meanwhile.

        Raises:
            SequenceError: it could not be measured.
            EngineError: as `batches`.
        """
        found: list[ExpansionTimes] = []

        def measure() -> None:
            self.engine.before_sweep = lambda: None
            found.append(self.engine.model.expansion_times())

        self.engine.before_sweep = measure
        self.engine.submit(SequenceRequest(_PROBE, Sampling(max_tokens=1, ignore_eos=True), prompt_ids=(0,)))
        for events in self.batches():
            if _PROBE in ended(events):
                break
        return found[0]


def ended(events: tuple[SequenceEvent, ...]) -> set[str]:
    """Ids of the sequences that ended.

    Raises:
        SequenceError: one of them failed.
    """
    finished = [event for event in events if isinstance(event, SequenceFinished)]
    for event in finished:
        if event.reason is FinishReason.ERROR:
            raise SequenceError(event.error_code or "engine", event.error or "the sequence failed")
    return {event.sequence_id for event in finished}
