"""An engine in another process, with the shape of an engine in this one.

Owns what is known here of that engine's sequences: those that live, calls that wait for an answer, events that wait to
be taken, totals over all its processes. When a process is lost, its sequences end with an engine's error, after the
last events that reached the worker; their jobs are then given back and resumed like after any failed sweep.
`child_host` has one for each model, `supervisor` keeps the process running.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from lamella_engine.errors import EngineClosed, EngineError, SequenceError
from lamella_engine.sequence_types import (
    EngineCounters,
    EngineFacts,
    FinishReason,
    SequenceFinished,
    SequenceRequest,
    SweepEvents,
)
from lamella_worker.channel import ChannelBroken
from lamella_worker.engine_messages import Answer, Beat, Cancel, Submit, Sweep, Taken
from lamella_worker.engine_port import CREDIT, ENGINE_ERROR, EngineAway
from lamella_worker.engine_process import EngineProcess
from lamella_worker.engine_totals import NO_COUNTERS, ended, summed
from lamella_worker.supervisor import Supervisor

SUBMIT_S = 300.0  # for tokenising the longest prompt on a busy host
_LOOK_S = 0.5


class _Batch(NamedTuple):
    """One sweep's events and the process they came from; None for those that were made here."""

    events: SweepEvents
    process: EngineProcess | None


class _Call:
    """A submit that waits for its answer."""

    def __init__(self, sequence_id: str) -> None:
        self.sequence_id = sequence_id
        self.is_answered = threading.Event()
        self.answer: Answer | None = None  # None where the process was lost first
        self.why = ""


class ChildEngine:
    """One engine of a process that `supervisor` starts again when it dies."""

    def __init__(self, model: str, supervisor: Supervisor) -> None:
        self._model = model
        self._supervisor = supervisor
        self._changed = threading.Condition()
        self._batches: deque[_Batch] = deque()  # CREDIT of one process, and a last word of each lost one
        self._live: dict[str, None] = {}
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count(1)
        self._past = self._now = NO_COUNTERS
        self._closed = threading.Event()

    @property
    def facts(self) -> EngineFacts:
        """What the engine that opened last is; raises EngineAway before the first one."""
        facts = self._supervisor.facts
        if facts is None:
            raise EngineAway("no engine has been opened yet")
        return facts[self._model]

    def counters(self) -> EngineCounters:
        """Totals since the worker opened its first engine, as of the last report."""
        with self._changed:
            return summed(self._past, self._now)

    def submit(self, request: SequenceRequest) -> None:
        """Take a sequence; waits for the process to have looked at it.

        Raises:
            SequenceError: it cannot run, or the process was lost while it looked at it.
            EngineAway: no engine is open; it was not looked at.
            EngineClosed: after `close`.
        """
        self._check_open()
        number, call = next(self._numbers), _Call(request.sequence_id)
        with self._changed:
            self._calls[number] = call
            self._live[request.sequence_id] = None
        try:
            self._supervisor.tell(Submit(self._model, number, request))
            deadline = time.monotonic() + SUBMIT_S
            while not call.is_answered.wait(_LOOK_S):
                self._check_open()
                if time.monotonic() >= deadline:
                    raise SequenceError(ENGINE_ERROR, f"the engine process did not answer within {SUBMIT_S:g} s")
        except BaseException:
            self._forget(number, call)
            raise
        if call.answer is None:
            raise SequenceError(ENGINE_ERROR, call.why)
        if call.answer.code is not None:
            raise SequenceError(call.answer.code, call.answer.message)

    def cancel(self, sequence_id: str) -> None:
        """End a sequence at the next sweep boundary; never waits, and unknown ids are ignored.

        Raises:
            EngineClosed: after `close`.
        """
        self._check_open()
        with self._changed:
            if sequence_id not in self._live:
                return
        with contextlib.suppress(EngineAway):  # lost with all its sequences
            self._supervisor.tell(Cancel(self._model, sequence_id))

    def events(self, poll_s: float = 0.5) -> Iterator[SweepEvents]:
        """Yield each sweep's events, and an empty batch after `poll_s` seconds of silence, until the engine closes.

        Raises:
            EngineError: the process failed for good.
        """
        while not self._closed.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._batches or self._has_ended(), poll_s)
                batch = self._batches.popleft() if self._batches else None
            if batch is None:
                if (failure := self._supervisor.failure) is not None:
                    raise EngineError(failure)
                yield SweepEvents(())
                continue
            if batch.process is not None:
                with contextlib.suppress(EngineAway):
                    batch.process.tell(Taken(self._model))
            yield batch.events

    def close(self) -> None:
        """Take no more, and end the events; `child_host` ends the process. Idempotent."""
        self._closed.set()
        self.changed()

    def hear(self, process: EngineProcess, report: Answer | Sweep | Beat) -> None:
        """Take note of a report about this engine, in the thread that reads."""
        with self._changed:
            match report:
                case Answer():
                    self._answered(report)
                case Beat():
                    self._now = report.counters
                case Sweep():
                    if sum(batch.process is process for batch in self._batches) >= CREDIT:
                        raise ChannelBroken("more events were sent than there was room for")
                    self._now = report.counters
                    for event in report.events:
                        if isinstance(event, SequenceFinished):
                            self._live.pop(event.sequence_id, None)
                    self._batches.append(_Batch(SweepEvents(report.events, report.sweep_seconds), process))
            self._changed.notify_all()

    def lost(self, why: str) -> None:
        """The process is gone: every sequence ends where its events end."""
        with self._changed:
            for call in self._calls.values():
                call.why = why
                call.is_answered.set()
                self._live.pop(call.sequence_id, None)  # told by the answer
            self._calls.clear()
            if self._live:
                last_words = tuple(_lost(sequence_id, why) for sequence_id in self._live)
                self._batches.append(_Batch(SweepEvents(last_words), None))
                self._live.clear()
            self._past, self._now = ended(summed(self._past, self._now)), NO_COUNTERS
            self._changed.notify_all()

    def changed(self) -> None:
        """Wake those who wait."""
        with self._changed:
            self._changed.notify_all()

    def _has_ended(self) -> bool:
        return self._closed.is_set() or self._supervisor.failure is not None

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise EngineClosed("the engine is closed")

    def _answered(self, answer: Answer) -> None:
        call = self._calls.pop(answer.call, None)
        if call is None:
            return  # whoever asked has gone
        call.answer = answer
        if answer.code is not None:
            self._live.pop(call.sequence_id, None)
        call.is_answered.set()

    def _forget(self, number: int, call: _Call) -> None:
        with self._changed:
            if self._calls.pop(number, None) is not None:
                self._live.pop(call.sequence_id, None)


def _lost(sequence_id: str, why: str) -> SequenceFinished:
    return SequenceFinished(sequence_id, FinishReason.ERROR, 0, 0, 0, 0, 0.0, ENGINE_ERROR, why)
