"""The engine: one model, one device, many sequences, one sweep thread.

`submit`, `cancel` and the iterator of events are the whole interface; they take and give plain data, so that the
engine can live in another process without its callers noticing. Sequences join and leave between sweeps.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch

from lamella_engine.detokenizer import Detokenizer
from lamella_engine.device import free_memory_bytes, peak_rss_bytes, resolve_device
from lamella_engine.errors import EngineClosed, EngineError, SequenceError
from lamella_engine.inspection import kv_bytes_per_token
from lamella_engine.kv_cache import PAGE_TOKENS, KVCache
from lamella_engine.options import EngineOptions
from lamella_engine.packing import PackedSweep
from lamella_engine.sampler import sample
from lamella_engine.scheduler import Ride, Scheduler
from lamella_engine.sequence import Sequence
from lamella_engine.sequence_types import (
    EngineCounters,
    EngineFacts,
    FinishReason,
    SequenceEvent,
    SequencePrefill,
    SequenceRequest,
    SweepEvents,
)
from lamella_engine.shard import ShardedModel
from lamella_engine.shard_store import ShardStore
from lamella_engine.sweep import SweepModel
from lamella_engine.text import TextCodec, end_token_ids, load_codec

logger = logging.getLogger(__name__)

MAX_WAITING = 1024  # sequences that may wait for room; one more is refused
NO_CONTEXT_LIMIT = 1 << 20  # tokens, for families whose config names no limit; the cache sets one then
MAX_UNDELIVERED = 2  # batches of events nobody took yet; then the sweep stalls
CLOSE_S = 150.0
_POLL_S = 0.2
_KV_TOKENS_PER_SEQUENCE = 2048
_KV_MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.5}  # of what is free once the model's resident part is loaded


class Engine:
    """A model being served; open it with `Engine.open`, close it with `close` or a ``with`` block.

    Attributes:
        codec: the model's tokenizer, or None if it ships none.
        end_token_ids: tokens that end a text unless a sequence ignores them.
    """

    def __init__(self, model: SweepModel, codec: TextCodec | None, options: EngineOptions) -> None:
        self._model = model
        self.codec = codec
        self._context_length = int(getattr(model.config, "max_position_embeddings", None) or NO_CONTEXT_LIMIT)
        self.end_token_ids = end_token_ids(model.sharded.directory, model.config, codec)
        self._cache = KVCache(_kv_tokens(model, options, self._context_length), model.device)
        self._scheduler = Scheduler(self._cache, options.max_sequences, options.sweep_tokens)
        self._max_sequences = options.max_sequences
        self._arrivals: list[Sequence] = []
        self._cancels: set[str] = set()
        self._live: set[str] = set()
        self._wake = threading.Condition()
        self._stop = threading.Event()
        self._outbox: queue.Queue[SweepEvents] = queue.Queue(maxsize=MAX_UNDELIVERED)
        self._sweeps = self._tokens = self._streamed_bytes = 0
        self._last_sweep_at: float | None = None
        self._failure: Exception | None = None  # what ended the sweep thread before its time
        self._thread = threading.Thread(target=self._run, name="lamella-sweep", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, model: str | Path, options: EngineOptions) -> Engine:
        """Open `model` (a name in the store or on the hub, or a checkpoint path), building its shards if needed.

        Raises:
            ModelError: the model cannot be had or cannot run.
            DeviceError: the device does not exist.
        """
        device = resolve_device(options.device)
        sharded = ShardStore(options.store).ensure(model, offline=options.offline, hub_token=options.hub_token)
        return cls.open_sharded(sharded, device, options)

    @classmethod
    def open_sharded(cls, sharded: ShardedModel, device: torch.device, options: EngineOptions) -> Engine:
        """Open a model whose shards are already at hand."""
        codec = load_codec(sharded.directory)
        model = SweepModel(sharded, device, options.dtype, options.ring_slots)
        try:
            return cls(model, codec, options)
        except BaseException:
            model.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def facts(self) -> EngineFacts:
        """What is served, and on what."""
        sharded = self._model.sharded
        return EngineFacts(
            model=sharded.name,
            family=self._model.family,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=str(self._model.device),
            num_layers=len(sharded.layers),
            context_length=self._context_length,
            size_bytes=sharded.size_bytes,
            max_sequences=self._max_sequences,
        )

    def counters(self) -> EngineCounters:
        """Totals since the engine opened; callable from any thread."""
        return EngineCounters(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + len(self._arrivals),
            sweeps=self._sweeps,
            tokens=self._tokens,
            streamed_bytes=self._streamed_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            last_sweep_at=self._last_sweep_at,
        )

    def submit(self, request: SequenceRequest) -> None:
        """Add a sequence; it joins the next sweep that has room. Callable from any thread.

        Raises:
            SequenceError: it cannot run (``code`` says why); nothing was added.
            EngineClosed: the engine is closed.
        """
        sequence = self._make_sequence(request)
        with self._wake:
            self._check_open()
            if request.sequence_id in self._live:
                raise SequenceError("duplicate", f"a sequence {request.sequence_id!r} is running already")
            if len(self._scheduler.waiting) + len(self._arrivals) >= MAX_WAITING:
                raise SequenceError("busy", f"{MAX_WAITING} sequences are waiting already; try again later")
            self._live.add(request.sequence_id)
            self._arrivals.append(sequence)
            self._wake.notify()

    def cancel(self, sequence_id: str) -> None:
        """End a sequence at the next sweep boundary; an unknown id is ignored. Callable from any thread."""
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
            try:
                yield self._outbox.get(timeout=poll_s)
            except queue.Empty:
                yield SweepEvents(())

    def close(self) -> None:
        """Stop the sweeps and free everything; live sequences end without an event. Idempotent."""
        with self._wake:
            self._stop.set()
            self._wake.notify()
        self._thread.join(timeout=CLOSE_S)
        if self._thread.is_alive():
            raise EngineError(f"the sweep thread did not stop within {CLOSE_S:.0f} s")
        self._model.close()

    def _check_open(self) -> None:
        if self._stop.is_set():
            raise EngineClosed("the engine is closed; open it again with Engine.open")
        self._check_alive()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineError(f"the engine failed and must be opened again: {self._failure}") from self._failure

    def _make_sequence(self, request: SequenceRequest) -> Sequence:
        prompt_ids = self._prompt_ids(request)
        room = min(self._context_length, self._cache.capacity_tokens)
        if len(prompt_ids) >= room:
            what = "context" if room == self._context_length else "key-value cache (engine option kv_tokens)"
            raise SequenceError(
                "prompt_too_long",
                f"the prompt has {len(prompt_ids)} tokens; the {what} of {self._model.sharded.name} holds {room}, "
                "and at least one must be left for the answer. Shorten the prompt.",
            )
        if request.sampling.temperature > 0 and request.sampling.seed is None:
            raise SequenceError("no_seed", "a sequence with temperature > 0 needs a seed")
        if request.sampling.stop and self.codec is None:
            raise SequenceError("no_tokenizer", "stop strings need a tokenizer, which this model does not ship")
        detokenizer = Detokenizer(self.codec.decode, request.sampling.stop) if self.codec else None
        return Sequence(request, prompt_ids, detokenizer, self.end_token_ids, room)

    def _prompt_ids(self, request: SequenceRequest) -> list[int]:
        if request.prompt_ids is not None:
            ids = list(request.prompt_ids)
        elif self.codec is None:
            raise SequenceError("no_tokenizer", "this model ships no tokenizer; submit token ids")
        elif request.messages is not None:
            ids = self.codec.encode_chat(request.messages)
        else:
            ids = self.codec.encode_prompt(request.prompt or "")
        if not ids:
            raise SequenceError("prompt_empty", "the prompt has no tokens; give at least one character of text")
        vocabulary = int(self._model.config.vocab_size)
        for token_id in (*ids, *request.generated_ids):
            if not 0 <= token_id < vocabulary:
                raise SequenceError("bad_token", f"token id {token_id} is outside the vocabulary of {vocabulary}")
        return ids

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            logger.exception("the sweep thread died")
            self._failure = error

    def _serve(self) -> None:
        while not self._stop.is_set():
            events = self._join_and_leave()
            self._scheduler.admit()
            if self._scheduler.running:
                events += self._sweep()
            if events:
                self._deliver(SweepEvents(tuple(events)))
            else:
                self._wait_for_work()

    def _join_and_leave(self) -> list[SequenceEvent]:
        """The sweep boundary: take in what arrived, let go what was cancelled or had ended before it came."""
        with self._wake:
            arrivals, self._arrivals = self._arrivals, []
            cancels, self._cancels = self._cancels, set()
            self._scheduler.waiting.extend(arrivals)
        events = []
        for sequence in [sequence for sequence in arrivals if sequence.reason is not None]:
            events.append(self._end(sequence, sequence.reason or FinishReason.STOP))
        for sequence_id in cancels:
            if (found := self._scheduler.find(sequence_id)) is not None:
                events.append(self._end(found, FinishReason.CANCELLED))
        return events

    def _sweep(self) -> list[SequenceEvent]:
        """One sweep for all running sequences; a failure ends them all and leaves the engine clean."""
        rides = self._scheduler.rides()
        try:
            pack = PackedSweep([ride.span for ride in rides], self._model.device)
            logits = self._model.run(pack, self._cache)
            return self._advance([rides[index] for index in pack.order], logits)
        except Exception as error:
            logger.exception("a sweep of %d sequences failed", len(rides))
            message = f"the sweep failed: {type(error).__name__}: {error}"
            events: list[SequenceEvent] = [
                self._end(sequence, FinishReason.ERROR, "engine", message) for sequence in list(self._scheduler.running)
            ]
            return events

    def _advance(self, rides: list[Ride], logits: torch.Tensor) -> list[SequenceEvent]:
        """Give each sequence what the sweep brought it; `rides` in the order of the rows of `logits`."""
        swept_bytes = self._model.streamed_bytes_per_sweep
        self._sweeps += 1
        self._streamed_bytes += swept_bytes
        self._last_sweep_at = time.time()
        for ride in rides:
            ride.sequence.computed += len(ride.span.token_ids)
            ride.sequence.sweeps += 1
            ride.sequence.streamed_bytes += swept_bytes
        events: list[SequenceEvent] = [
            SequencePrefill(ride.sequence.sequence_id, ride.sequence.computed, ride.sequence.length)
            for ride in rides
            if not ride.completes
        ]
        rows = [row for row, ride in enumerate(rides) if ride.completes]
        if not rows:
            return events
        choices = sample(logits[rows], [rides[row].sequence.draw() for row in rows])
        for row, choice in zip(rows, choices, strict=True):
            sequence = rides[row].sequence
            if choice.error is not None:
                events.append(self._end(sequence, FinishReason.ERROR, choice.error.code, str(choice.error)))
                continue
            events.append(sequence.accept(choice))
            self._tokens += 1
            if sequence.reason is not None:
                events.append(self._end(sequence, sequence.reason))
        return events

    def _end(
        self, sequence: Sequence, reason: FinishReason, error_code: str | None = None, error: str | None = None
    ) -> SequenceEvent:
        sequence.reason = reason
        self._scheduler.remove(sequence)
        with self._wake:
            self._live.discard(sequence.sequence_id)
        return sequence.finished(error_code, error)

    def _deliver(self, batch: SweepEvents) -> None:
        while not self._stop.is_set():
            try:
                return self._outbox.put(batch, timeout=_POLL_S)
            except queue.Full:
                continue

    def _wait_for_work(self) -> None:
        with self._wake:
            if not (self._arrivals or self._cancels or self._stop.is_set()):
                self._wake.wait(timeout=_POLL_S)


def _kv_tokens(model: SweepModel, options: EngineOptions, context_length: int) -> int:
    """Tokens the key-value cache holds: as asked for, else a useful amount within a share of the free memory."""
    if options.kv_tokens is not None:
        return options.kv_tokens
    wanted = max(options.max_sequences * _KV_TOKENS_PER_SEQUENCE, context_length)
    per_token = kv_bytes_per_token(model.config, model.dtype)
    affordable = int(free_memory_bytes(model.device) * _KV_MEMORY_SHARE[model.device.type] / per_token)
    return max(PAGE_TOKENS, min(wanted, affordable))
