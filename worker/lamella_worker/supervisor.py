"""Keeps an engine process running: starts it, watches it, kills it where it hangs, starts it again where it ends.

Owns one thread, from which every engine process is started and to which its end is tied. What the reports about
sequences mean is `child_host`'s; when to give up is `restart_rule`'s, what counts as hung `turns_watch`'s.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lamella_engine.sequence_types import EngineFacts
from lamella_worker.config import EngineTable
from lamella_worker.engine_messages import Answer, Beat, Broken, Open, Opened, Order, Progress, Refused, Report, Sweep
from lamella_worker.engine_port import ChildState, EngineAway, ServedModel
from lamella_worker.engine_process import COMMAND, EngineProcess, EngineStuck
from lamella_worker.restart_rule import BatchSize, RestartRule
from lamella_worker.sweep_watch import SweepWatch
from lamella_worker.turns_watch import TurnsWatch
from lamella_worker.worker_table import WorkerTable

log = logging.getLogger(__name__)

LOOK_S = 0.2
LATE_S = 1.0  # a look so much later than it was due: this process was stopped, or starved
LEAVE_S = 5.0  # for a process to end that has closed its channel
TELL_EVERY_S = 15.0


@dataclass(frozen=True)
class EngineSpec:
    """What every engine process of a worker opens, and the program that it runs."""

    models: tuple[ServedModel, ...]
    table: EngineTable
    device: str
    command: Sequence[str] = COMMAND


class Listener(Protocol):
    """Who is told what the engine processes report."""

    def hear(self, process: EngineProcess, report: Answer | Sweep | Beat) -> None:
        """A report about sequences."""

    def lost(self, why: str) -> None:
        """The engine process is gone, with all its sequences; every report of it was heard before."""

    def changed(self) -> None:
        """The engines are open, or there will be none any more."""


class Supervisor:
    """The thread that keeps one engine process running.

    Args:
        spec: what is run.
        limits: how long things may take, and how often they may fail.
        listener: who is told.
    """

    def __init__(self, spec: EngineSpec, limits: WorkerTable, listener: Listener) -> None:
        self._spec = spec
        self._limits = limits
        self._listener = listener
        self._rule = RestartRule(limits.max_restarts, limits.restart_window_s)
        self._batch = BatchSize(spec.table.max_sequences)
        self._process: EngineProcess | None = None
        self._watch: TurnsWatch | None = None
        self._refused: Refused | None = None
        self._broken: str | None = None
        self._is_short_of_memory = False
        self._progress: Progress | None = None
        self._progress_at = 0.0
        self._told_at = 0.0
        self._restarts = 0
        self._trouble: str | None = None
        self._closing = threading.Event()
        self.facts: Mapping[str, EngineFacts] | None = None  # of the last engines that opened, by model
        self.ready = threading.Event()
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine-supervisor", daemon=True)

    def start(self) -> None:
        """Start the first engine process."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the engine process and the thread; False if they have not ended after `timeout_s` seconds."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def tell(self, order: Order) -> None:
        """Send an order to the engines.

        Raises:
            EngineAway: none is open.
        """
        process = self._process
        if process is None or not self.ready.is_set():
            raise EngineAway(self._trouble or "the engine is not open yet")
        process.tell(order)

    @property
    def state(self) -> ChildState:
        """How the engine process stands."""
        process = self._process
        return ChildState(
            pid=None if process is None else process.pid,
            is_ready=self.ready.is_set(),
            restarts=self._restarts,
            max_sequences=self._batch.current,
            trouble=self._trouble,
            has_failed=self.failure is not None,
        )

    def _run(self) -> None:
        try:
            while not self._closing.is_set() and self.failure is None:
                self._live_once()
        except EngineStuck as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("the supervisor failed")
            self._fail(f"the supervisor failed: {type(error).__name__}: {error}")

    def _live_once(self) -> None:
        """The life of one engine process, and the pause before the next."""
        self._watch = self._refused = self._broken = self._progress = None
        self._is_short_of_memory = False
        began = self._progress_at = time.monotonic()
        table = self._spec.table.model_copy(update={"max_sequences": self._batch.current})
        order = Open(self._spec.models, table, self._spec.device, self._restarts)
        process = self._process = EngineProcess(order, self._hear, self._spec.command)
        hung = None
        try:
            hung = self._look_after(process)
        finally:
            self.ready.clear()
            code = process.end(self._limits.drain_s / 4 if self._closing.is_set() else 0)
            self._process = None
            self.ready.clear()  # the last reports may have said otherwise
        if self._closing.is_set():
            return
        self._trouble = self._why(process.pid, code, hung)
        log.error("%s", self._trouble)
        self._listener.lost(self._trouble)
        self._go_on(code, hung, served_s=time.monotonic() - began)

    def _look_after(self, process: EngineProcess) -> str | None:
        """Come back when it has ended, when it must be ended (then why), or when the worker closes."""
        looked = time.monotonic()
        while not self._closing.is_set():
            if process.has_ended.wait(LOOK_S):
                return None if process.wait(LEAVE_S) is not None else "it closed its channel and did not end"
            now = time.monotonic()
            is_late, looked = now - looked > LOOK_S + LATE_S, now
            watch = self._watch
            if is_late:
                self._progress_at = now
                if watch is not None:
                    watch.forgive(now)
            complaint = self._opening_complaint(now) if watch is None else watch.complaint(now)
            if complaint is not None:
                return complaint
        return None

    def _opening_complaint(self, now: float) -> str | None:
        silent_s = now - self._progress_at
        if silent_s <= self._limits.open_s:
            return None
        return f"opening the model did not get on for {silent_s:.0f} s, and open_s is {self._limits.open_s:g}"

    def _hear(self, process: EngineProcess, report: Report) -> None:
        """In the reading thread of `process`, the one that lives now."""
        now = time.monotonic()
        match report:
            case Opened():
                self.facts = report.facts
                self._watch = TurnsWatch({model: self._watch_of(facts, now) for model, facts in report.facts.items()})
                self.ready.set()
                self._listener.changed()
            case Progress():
                self._note_progress(report, now)
            case Refused():
                self._refused = report
            case Broken():
                self._broken = report.message
            case Answer():
                self._listener.hear(process, report)
            case Sweep() | Beat():
                if self._watch is not None:
                    is_stalled = isinstance(report, Beat) and report.is_stalled
                    self._watch.hear(report.model, report.counters, is_stalled=is_stalled, now=now)
                if report.counters.out_of_memory > 0:
                    self._is_short_of_memory = True
                self._listener.hear(process, report)

    def _watch_of(self, facts: EngineFacts, now: float) -> SweepWatch:
        return SweepWatch(self._limits.hang_s, self._limits.hang_sweeps, facts.size_bytes, now)

    def _note_progress(self, report: Progress, now: float) -> None:
        if report != self._progress:
            self._progress, self._progress_at = report, now
        if now - self._told_at >= TELL_EVERY_S:
            self._told_at = now
            share = 100 * report.done_bytes // max(1, report.total_bytes)
            names = ", ".join(model.name for model in self._spec.models)
            log.info("opening %s: %s, %d %% of %d bytes", names, report.phase, share, report.total_bytes)

    def _why(self, pid: int, code: int, hung: str | None) -> str:
        what = f"engine process {pid} "
        if hung is not None:
            return f"{what}hung: {hung}; it was killed"
        if self._refused is not None:
            return self._refused.message
        if self._broken is not None:
            return f"{what}gave up: {self._broken}"
        if code == -signal.SIGKILL:
            return f"{what}was killed by SIGKILL, most likely because the host ran out of memory"
        if code < 0:
            return f"{what}was killed by {_signal_name(-code)}"
        return f"{what}ended with exit code {code}"

    def _go_on(self, code: int, hung: str | None, served_s: float) -> None:
        """Decide what follows the end of a process, and wait as long as that takes."""
        is_memory = self._is_short_of_memory or (code == -signal.SIGKILL and hung is None)
        if self._refused is not None:
            is_memory = self._refused.is_out_of_memory
        if self.facts is None and hung is None and code >= 0 and not is_memory:
            self._fail(self._trouble or "")  # it said no by itself, before any worker could have disturbed it
            return
        if is_memory and self._batch.halve():
            log.warning("memory was short: the next engine runs at most %d sequences", self._batch.current)
        pause_s = self._rule.pause_s(time.monotonic(), served_s)
        if pause_s is None:
            self._fail(
                f"the engine process ended {self._rule.most + 1} times within {self._rule.window_s:g} s and is not "
                f"started again. The last time: {self._trouble}. Look at its messages above; jobs that it ran name it "
                "with job=<id>"
            )
            return
        log.info(
            "starting the engine process again in %g s, restart %d of %d within %g s",
            pause_s, self._rule.in_window, self._rule.most, self._rule.window_s,
        )  # fmt: skip
        if not self._closing.wait(pause_s):
            self._restarts += 1

    def _fail(self, why: str) -> None:
        self.failure = why
        self.ready.clear()
        self._listener.lost(why)
        self._listener.changed()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
