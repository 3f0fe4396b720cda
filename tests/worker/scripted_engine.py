"""An engine without weights: the second implementation of the worker's narrow interface.

Its text is a function of the prompt and the position alone, so a resumed sequence goes on exactly where it was. A
prompt's first word steers it: ``slow`` reads its prompt for ever, ``crash`` fails every sweep it rides, ``die`` ends
the process, ``break`` ends the events with an exception, ``bad`` is refused. `hold` stops the sweeps, as a hung kernel
would.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lamella_engine.errors import EngineClosed, SequenceError
from lamella_engine.sequence_types import (
    EngineCounters,
    EngineFacts,
    FinishReason,
    SequenceEvent,
    SequenceFinished,
    SequencePrefill,
    SequenceRequest,
    SequenceTokens,
    SweepEvents,
)


def scripted_text(prompt: str, num_tokens: int) -> str:
    """The text that `num_tokens` tokens of a prompt's answer make."""
    return "".join(f"{token_id} " for token_id in _token_ids(prompt, num_tokens))


def _token_ids(prompt: str, num_tokens: int) -> list[int]:
    return [(len(prompt) * 7 + position * 13) % 1000 for position in range(num_tokens)]


@dataclass
class _Sequence:
    request: SequenceRequest
    position: int
    sweeps: int = 0
    was_prefilled: bool = field(default=False)

    @property
    def prompt(self) -> str:
        return self.request.prompt or "".join(content for _, content in self.request.messages or ())

    @property
    def script(self) -> str:
        return self.prompt.split(" ")[0]


class ScriptedEngine:
    """One token a sweep for every sequence; sweeps run as fast as their events are taken."""

    def __init__(self, max_sequences: int = 8, sweep_s: float = 0.002) -> None:
        self._max_sequences = max_sequences
        self._sweep_s = sweep_s
        self._lock = threading.Lock()
        self._sequences: dict[str, _Sequence] = {}
        self._cancels: set[str] = set()
        self._outbox: queue.Queue[SweepEvents] = queue.Queue(maxsize=2)
        self._closed = threading.Event()
        self._free = threading.Event()
        self._free.set()
        self._sweeps = self._tokens = 0
        self._last_sweep_at: float | None = None
        self.widest = 0
        self.before_sweep: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="scripted-sweep", daemon=True)
        self._thread.start()

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts("scripted", "llama", "float32", "cpu", 4, 4096, 1_000_000, self._max_sequences)

    @property
    def sequence_ids(self) -> list[str]:
        with self._lock:
            return list(self._sequences)

    def counters(self) -> EngineCounters:
        with self._lock:
            running = len(self._sequences)
        return EngineCounters(
            running=running, waiting=0, sweeps=self._sweeps, tokens=self._tokens, streamed_bytes=0, peak_rss_bytes=1,
            last_sweep_at=self._last_sweep_at,
        )  # fmt: skip

    def hold(self) -> None:
        self._free.clear()

    def go_on(self) -> None:
        self._free.set()

    def submit(self, request: SequenceRequest) -> None:
        if self._closed.is_set():
            raise EngineClosed("the engine is closed")
        sequence = _Sequence(request, len(request.generated_ids))
        if sequence.script == "bad":
            raise SequenceError("prompt_too_long", "the prompt does not fit; shorten it")
        assert list(request.generated_ids) == _token_ids(sequence.prompt, len(request.generated_ids))
        with self._lock:
            self._sequences[request.sequence_id] = sequence

    def cancel(self, sequence_id: str) -> None:
        if self._closed.is_set():
            raise EngineClosed("the engine is closed")
        with self._lock:
            self._cancels.add(sequence_id)

    def events(self, poll_s: float = 0.5) -> Iterator[SweepEvents]:
        while not self._closed.is_set():
            with self._lock:
                if any(sequence.script == "break" for sequence in self._sequences.values()):
                    raise RuntimeError("a scripted break")
            try:
                yield self._outbox.get(timeout=poll_s)
            except queue.Empty:
                yield SweepEvents(())

    def close(self) -> None:
        self._closed.set()
        self._free.set()
        self._thread.join(timeout=40)

    def _run(self) -> None:
        while not self._closed.wait(self._sweep_s):
            self._free.wait(timeout=60)
            events = self._sweep()
            while events and not self._closed.is_set():
                try:
                    self._outbox.put(SweepEvents(tuple(events)), timeout=0.1)
                    break
                except queue.Full:
                    continue

    def _sweep(self) -> list[SequenceEvent]:
        events: list[SequenceEvent] = []
        with self._lock:
            cancels, self._cancels = self._cancels, set()
            for sequence_id in cancels & self._sequences.keys():
                events.append(_finished(self._sequences.pop(sequence_id), FinishReason.CANCELLED))
            riders = list(self._sequences.values())
        if any(rider.script == "die" for rider in riders):
            os._exit(9)
        try:
            if riders:
                self.before_sweep()
        except (RuntimeError, ValueError) as error:
            return [
                *events,
                *(self._end(r, FinishReason.ERROR, "engine", f"the sweep failed: {error}") for r in riders),
            ]
        if any(rider.script == "crash" for rider in riders):
            return [*events, *(self._end(r, FinishReason.ERROR, "engine", "scripted crash") for r in riders)]
        if riders:
            self._sweeps += 1
            self._last_sweep_at = time.time()
            self.widest = max(self.widest, len(riders))
        for rider in riders:
            rider.sweeps += 1
            events.extend(self._advance(rider))
        return events

    def _advance(self, rider: _Sequence) -> list[SequenceEvent]:
        if rider.script == "slow":
            return [SequencePrefill(rider.request.sequence_id, rider.sweeps, 1_000_000)]
        token_id = _token_ids(rider.prompt, rider.position + 1)[-1]
        events: list[SequenceEvent] = [
            SequenceTokens(rider.request.sequence_id, rider.position, (token_id,), f"{token_id} ")
        ]
        rider.position += 1
        self._tokens += 1
        if rider.position >= rider.request.sampling.max_tokens:
            events.append(self._end(rider, FinishReason.LENGTH))
        return events

    def _end(
        self, rider: _Sequence, reason: FinishReason, code: str | None = None, error: str | None = None
    ) -> SequenceEvent:
        with self._lock:
            self._sequences.pop(rider.request.sequence_id, None)
        return _finished(rider, reason, code, error)


@dataclass
class ScriptedSet:
    """Scripted engines that are closed together."""

    engines: dict[str, ScriptedEngine]

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def _finished(
    rider: _Sequence, reason: FinishReason, code: str | None = None, error: str | None = None
) -> SequenceFinished:
    return SequenceFinished(
        rider.request.sequence_id, reason, len(rider.prompt), rider.position, rider.sweeps, 0, 0.1, code, error
    )
