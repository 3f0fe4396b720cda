"""The engine: one model, one device, many sequences, one sweep thread.

`submit`, `cancel` and the iterator of events are the whole interface; they take and give plain data, so that the
engine can live in another process without its callers noticing. Sequences join and leave between sweeps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from lamella_engine.admission import Admission
from lamella_engine.batch_limit import BatchLimit
from lamella_engine.device import peak_rss_bytes, resolve_device
from lamella_engine.embedding_job import EmbeddingJob, EmbeddingJobs
from lamella_engine.errors import EngineClosed, EngineError, OptionError, SequenceError
from lamella_engine.kv_shape import context_tokens
from lamella_engine.open_model import open_sweep_model
from lamella_engine.options import EngineOptions
from lamella_engine.out_of_memory import free_what_is_cached, is_out_of_memory
from lamella_engine.outbox import Outbox
from lamella_engine.peer_address import Peers
from lamella_engine.placement import Plan
from lamella_engine.sampler import Choice, sample
from lamella_engine.scheduler import Ride, Scheduler
from lamella_engine.sequence import Sequence
from lamella_engine.sequence_types import (
    EngineCounters,
    EngineFacts,
    FinishReason,
    SequenceEvent,
    SequenceRequest,
    SweepEvents,
)
from lamella_engine.shard import ShardedModel
from lamella_engine.shard_store import ShardStore
from lamella_engine.state_pool import StatePool
from lamella_engine.stepwise import StepPack
from lamella_engine.sweep import SweepModel
from lamella_engine.sweep_thread import SweepThread
from lamella_engine.text import TextCodec, end_token_ids, load_codec
from lamella_engine.timeline import Lane

logger = logging.getLogger(__name__)

MAX_WAITING = 1024  # sequences that may wait for room; one more is refused
CLOSE_S = 150.0
_POLL_S = 0.2


class Engine:
    """A model being served; open it with `Engine.open`, close it with `close` or a ``with`` block.

    Attributes:
        model, codec: swept by the engine's thread alone; the tokenizer, or None if it ships none.
        end_token_ids: tokens that end a text unless a sequence ignores them.
        before_sweep: called in the sweep thread before each sweep; what it raises fails the sweep, as if from within.

    With `wake`, notified when `wants_turn` may have changed, it sweeps only when `take_turn` is called on `thread`.
    """

    def __init__(
        self,
        model: SweepModel,
        codec: TextCodec | None,
        options: EngineOptions,
        thread: SweepThread | None = None,
        wake: threading.Condition | None = None,
    ) -> None:
        self.model = model
        self.codec = codec
        self._context_length = context_tokens(model.config)
        self.end_token_ids = end_token_ids(model.sharded.directory, model.config, codec)
        self._cache = model.open_pool()
        whole = self._cache if model.reads_whole and isinstance(self._cache, StatePool) else None
        beside = None if whole is None else whole.pages_beside
        self._admission = Admission(model, codec, self._cache, options, self.end_token_ids)
        self._scheduler = Scheduler(self._cache, options.max_sequences, model.plan.sweep_tokens, beside)
        self._embeddings = EmbeddingJobs(self._scheduler, self._forget)
        self._max_sequences = options.max_sequences
        self._batch = BatchLimit(options.max_sequences)
        self.before_sweep: Callable[[], object] = lambda: None
        self._arrivals: list[Sequence | EmbeddingJob] = []
        self._cancels: set[str] = set()
        self._live: set[str] = set()
        self._wake = wake or threading.Condition()
        self._stop = threading.Event()
        self._outbox = Outbox(self._stop, wake)
        self._sweeps = self._tokens = self._streamed_bytes = 0
        self._sweep_seconds: list[float] = []  # of sweeps whose events are not delivered yet
        self._last_sweep_at: float | None = None
        self._failure: Exception | None = None  # what ended the sweep thread before its time
        self._thread = thread or SweepThread()
        if wake is None:
            self._thread.start(self._run)

    @classmethod
    def open(cls, model: str | Path, options: EngineOptions) -> Engine:
        """Open `model` (a name in the store or on the hub, or a checkpoint path), building its shards if needed.

        Raises:
            ModelError: the model cannot be had or cannot run.
            DeviceError: the device does not exist.
        """
        device = resolve_device(options.device)
        store = ShardStore(options.store, peers=Peers.named(options.peers))
        sharded = store.ensure(model, offline=options.offline, hub_token=options.hub_token)
        return cls.open_sharded(sharded, device, options)

    @classmethod
    def open_sharded(cls, sharded: ShardedModel, device: torch.device, options: EngineOptions) -> Engine:
        """Open a model whose shards are already at hand."""
        codec = load_codec(sharded.directory)
        thread = SweepThread()
        with ExitStack() as undo:
            undo.callback(thread.end)
            model = thread.call(lambda: open_sweep_model(sharded, options, device), SweepModel.close)
            undo.callback(model.close)
            engine = cls(model, codec, options, thread)
            undo.pop_all()
        return engine

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def facts(self) -> EngineFacts:
        """What is served, and on what."""
        sharded = self.model.sharded
        return EngineFacts(
            model=sharded.name,
            family=self.model.family,
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(self.model.device),
            num_layers=len(sharded.layers),
            context_length=self._context_length,
            size_bytes=sharded.size_bytes,
            max_sequences=self._max_sequences,
            plan=self.model.plan_facts,
        )

    @property
    def plan(self) -> Plan:
        """Where every byte of the model is."""
        return self.model.plan

    def write_trace(self, path: Path) -> None:
        """Write the timeline of recent sweeps, kept with the option ``trace``, as a Chrome trace.

        Raises:
            OptionError: the engine was opened without ``trace``.
        """
        if not self.model.timeline.is_tracing:
            raise OptionError("there is no trace: open the engine with the option trace=True")
        self.model.timeline.write_trace(path)

    def counters(self) -> EngineCounters:
        """Totals since the engine opened; callable from any thread."""
        return EngineCounters(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + len(self._arrivals) + self._embeddings.num_waiting,
            sweeps=self._sweeps,
            tokens=self._tokens,
            streamed_bytes=self._streamed_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            last_sweep_at=self._last_sweep_at,
            **asdict(self.model.timeline.totals()),
            preemptions=self._scheduler.preemptions,
            out_of_memory=self._batch.failures,
            batch_limit=self._batch.limit,
            kv_blocks=self._cache.num_pages,
            kv_blocks_used=self._cache.num_pages - self._cache.free_pages,
        )

    def submit(self, request: SequenceRequest) -> None:
        """Add a sequence, all its samples; it joins the next sweep that has room. Callable from any thread.

        Raises:
            SequenceError: it cannot run (``code`` says why); nothing was added.
            EngineClosed: the engine is closed.
        """
        arrival = self._admission.admit(request)
        with self._wake:
            self._check_open()
            if request.sequence_id in self._live:
                raise SequenceError("duplicate", f"a sequence {request.sequence_id!r} is running already")
            if len(self._scheduler.waiting) + len(self._arrivals) >= MAX_WAITING:
                raise SequenceError("busy", f"{MAX_WAITING} sequences are waiting already; try again later")
            self._live.add(request.sequence_id)
            self._arrivals.append(arrival)
            self._wake.notify()

    def cancel(self, sequence_id: str) -> None:
        """End a sequence, all its samples, at the next boundary; an unknown id is ignored. Callable from any thread."""
        with self._wake:
            self._check_open()
            self._cancels.add(sequence_id)
            self._wake.notify()

    def events(self, poll_s: float = 0.5) -> Iterator[SweepEvents]:
        """Batches of events, one a sweep, for one consumer; an empty one after `poll_s` seconds of silence.

        Ends when the engine is closed. Two batches not taken stall the sweeps, so a slow consumer loses nothing.

        Raises:
            EngineError: the sweep thread died; the engine can only be closed.
        """
        while not self._stop.is_set():
            self._check_alive()
            yield self._outbox.take(poll_s)

    @property
    def wants_turn(self) -> bool:
        """There is something to do, and room for its events."""
        has_work = self._arrivals or self._cancels or self._scheduler.running or self._scheduler.waiting
        return bool(has_work) and self._failure is None and not self._outbox.is_full

    def take_turn(self) -> bool:
        """The sweep boundary, and a sweep if anyone runs then; False if there was nothing to do."""
        events = self._join_and_leave()
        self._embeddings.feed()
        self._scheduler.admit()
        if self._scheduler.running:
            events += self._sweep()
        if events:
            sweep_seconds, self._sweep_seconds = tuple(self._sweep_seconds), []
            self._outbox.put(SweepEvents(tuple(events), sweep_seconds))
        return bool(events or self._scheduler.running)

    def fail(self, error: Exception) -> None:
        """Sweep no more; whoever asks is told of `error`."""
        self._failure = error

    def close(self) -> None:
        """Stop the sweeps and free everything; live sequences end without an event. Idempotent."""
        with self._wake:
            self._stop.set()
            self._wake.notify()
        if not self._thread.join(timeout=CLOSE_S):
            raise EngineError(f"the sweep thread did not stop within {CLOSE_S:.0f} s")
        self.model.close()
        self._cache.close()

    def _check_open(self) -> None:
        if self._stop.is_set():
            raise EngineClosed("the engine is closed; open it again with Engine.open")
        self._check_alive()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineError(f"the engine failed and must be opened again: {self._failure}") from self._failure

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if not self.take_turn():
                    self._wait_for_work()
        except Exception as error:
            logger.exception("the sweep thread died")
            self.fail(error)

    def _join_and_leave(self) -> list[SequenceEvent]:
        """The sweep boundary: take in what arrived, let go what was cancelled or had ended before it came."""
        with self._wake:
            arrivals, self._arrivals = self._arrivals, []
            cancels, self._cancels = self._cancels, set()
            self._scheduler.waiting.extend(each for each in arrivals if isinstance(each, Sequence))
        events: list[SequenceEvent] = []
        for arrival in arrivals:
            if isinstance(arrival, EmbeddingJob):
                self._embeddings.add(arrival)
            elif arrival.reason is not None:
                events += self._end(arrival, arrival.reason)
        for sequence_id in cancels:
            job = self._embeddings.of(sequence_id)
            if job is not None:
                events += self._embeddings.end(job, FinishReason.CANCELLED)
            for sequence in self._scheduler.find(sequence_id):
                events += self._end(sequence, FinishReason.CANCELLED)
        return events

    def _sweep(self) -> list[SequenceEvent]:
        """One sweep for all running sequences; a failure ends them all and leaves the engine clean.

        Where memory was short only the youngest goes back to wait, and the others sweep again.
        """
        events: list[SequenceEvent] = []
        try:
            self._sweep_once(events)
            return events
        except Exception as error:
            failed = list(self._scheduler.running)
            about = {"sequences": [sequence.sequence_id for sequence in failed]}  # for whoever formats the log
            logger.exception("a sweep of %d sequences failed", len(failed), extra=about)
            if not is_out_of_memory(error) or not self._batch.shrink(len(failed)):
                message = f"the sweep failed: {type(error).__name__}: {error}"
                for sequence in failed:
                    if sequence.table is not None:  # the first text of a job takes the others along
                        events += self._end(sequence, FinishReason.ERROR, "engine", message)
                return events
        # The error is let go of by now, and with it the tensors of the sweep.
        self._scheduler.shed(self._batch.limit, is_state_lost=isinstance(self._cache, StatePool))
        free_what_is_cached(self.model.device)
        logger.warning("out of memory: the youngest waits; at most %d run side by side now", self._batch.limit)
        return events

    def _sweep_once(self, events: list[SequenceEvent]) -> None:
        began_s = time.perf_counter()
        self.before_sweep()
        rides = self._scheduler.rides()
        pack = self.model.pack([ride.span for ride in rides])
        in_order = [rides[index] for index in pack.order]
        hidden: torch.Tensor | None = None
        if any(self._embeddings.of(ride.sequence) for ride in rides):
            logits, hidden = self.model.run_heard(pack, self._cache)
        else:
            logits = self.model.run(pack, self._cache)
        self._advance(in_order, logits, events)
        if hidden is not None and not isinstance(pack, StepPack):
            events += self._embeddings.advance(in_order, hidden, pack.last_rows.tolist(), self.model.swept_bytes)
        ended_s = time.perf_counter()
        self.model.timeline.add(Lane.SWEEP, "sweep", began_s, ended_s)
        self._sweep_seconds.append(ended_s - began_s)
        if self._batch.good_sweep():
            self._scheduler.max_sequences = self._batch.limit

    def _advance(self, rides: list[Ride], logits: torch.Tensor, events: list[SequenceEvent]) -> None:
        """Give each sequence what the sweep brought it and add to `events`; `rides` as the rows of `logits`."""
        swept_bytes = self.model.swept_bytes
        self._sweeps += 1
        self._streamed_bytes += swept_bytes
        self._last_sweep_at = time.time()
        for ride in rides:
            ride.sequence.ride(len(ride.span.token_ids), swept_bytes)
        answers = [(row, ride) for row, ride in enumerate(rides) if self._embeddings.of(ride.sequence) is None]
        partial = [ride.sequence.prefilled() for _, ride in answers if not ride.completes]
        events += [event for event in partial if event is not None]
        rows = [row for row, ride in answers if ride.completes for _ in range(ride.sequence.places)]
        if not rows:
            return
        drawing = [
            sequence for _, ride in answers if ride.completes for sequence in self._scheduler.fork(ride.sequence)
        ]
        wanted = logits if rows == list(range(len(logits))) else logits[rows]
        choices = sample(wanted, [sequence.draw() for sequence in drawing])
        for sequence, choice in zip(drawing, choices, strict=True):
            if choice.error is not None:
                events += self._end(sequence, FinishReason.ERROR, choice.error.code, str(choice.error))
                continue
            events += self._accept(sequence, choice)

    def _accept(self, sequence: Sequence, choice: Choice) -> list[SequenceEvent]:
        try:
            sequence.accept(choice)
        except SequenceError as error:
            return self._end(sequence, FinishReason.ERROR, error.code, str(error))
        return self._news(sequence) if sequence.reason is None else self._end(sequence, sequence.reason)

    def _news(self, sequence: Sequence) -> list[SequenceEvent]:
        news = sequence.news()
        if news is None:
            return []
        self._tokens += len(news.token_ids)
        return [news]

    def _end(
        self, sequence: Sequence, reason: FinishReason, error_code: str | None = None, error: str | None = None
    ) -> list[SequenceEvent]:
        """Let a sequence go, with the samples that were to start from its prompt; their last events."""
        job = self._embeddings.of(sequence)
        if job is not None:
            return self._embeddings.end(job, reason, error_code, error)
        self._scheduler.remove(sequence)
        if not self._scheduler.find(sequence.sequence_id):
            self._forget(sequence.sequence_id)
        events: list[SequenceEvent] = []
        for ended in (sequence, *sequence.siblings):
            events += self._news(ended)
            events.append(ended.finished(reason, error_code, error))
        return events

    def _forget(self, sequence_id: str) -> None:
        with self._wake:
            self._live.discard(sequence_id)

    def _wait_for_work(self) -> None:
        with self._wake:
            if not (self._arrivals or self._cancels or self._stop.is_set()):
                self._wake.wait(timeout=_POLL_S)
