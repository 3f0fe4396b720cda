"""Texts whose hidden states are wanted in place of tokens: each is a sequence that only reads, and all end together.

Owns what has been pooled of each text, and how many of a job's texts are under way: as many as there are places that
nobody else wants, and one where there are none, so that texts fill sweeps and never keep a conversation waiting.
Changed by the sweep thread only. `engine` feeds them to the `scheduler` and hands over the rows of each sweep.
"""

from __future__ import annotations

import base64
import time
from collections import deque
from collections.abc import Callable

import torch

from lamella_engine.scheduler import Ride, Scheduler
from lamella_engine.sequence import Sequence
from lamella_engine.sequence_types import (
    FinishReason,
    Pooling,
    SequenceEmbeddings,
    SequenceEvent,
    SequenceFinished,
    SequencePrefill,
)

NOT_FINITE = (
    "the hidden states are not numbers; the compute type overflows on this model. "
    "Run it with dtype bfloat16 or float32."
)


class EmbeddingJob:
    """The texts of one request.

    Attributes:
        sequence_id: the caller's name for it.
        waiting: texts that are not under way, in order.
        live: those that are.
    """

    def __init__(self, sequence_id: str, texts: list[Sequence], pooling: Pooling, *, is_normalised: bool) -> None:
        self.sequence_id = sequence_id
        self.waiting = deque(texts)
        self.live: list[Sequence] = []
        self._pooling = pooling
        self._is_normalised = is_normalised
        self._total_tokens = sum(text.length for text in texts)
        self._sums: dict[int, torch.Tensor] = {}
        self._vectors: list[torch.Tensor | None] = [None] * len(texts)
        self._read_tokens = 0  # of texts that are done
        self._told = 0
        self._sweeps = 0
        self._streamed_bytes = 0
        self._began = time.monotonic()

    @property
    def is_complete(self) -> bool:
        """Whether every text is done."""
        return not self.waiting and not self.live

    @property
    def is_finite(self) -> bool:
        """Whether everything pooled so far is a number."""
        return all(bool(torch.isfinite(vector).all()) for vector in self._vectors if vector is not None)

    def start(self) -> Sequence:
        """The next text, which is under way from now on."""
        text = self.waiting.popleft()
        self.live.append(text)
        return text

    def pool(self, text: Sequence, start: int, rows: torch.Tensor, *, completes: bool) -> None:
        """Take hidden states of `text`, [tokens, width], its tokens from `start` on; what was before them stays."""
        if self._pooling is Pooling.LAST:
            total = rows[-1].double()
        else:
            total = rows.sum(0, dtype=torch.float64)
            if start:  # one that was preempted begins again
                total += self._sums[text.sample]
        self._sums[text.sample] = total
        if completes:
            self._vectors[text.sample] = self._finished(self._sums.pop(text.sample), text.length)
            self._read_tokens += text.length
            self.live.remove(text)

    def ride(self, streamed_bytes: int) -> None:
        """Take note of a sweep that some of its texts rode."""
        self._sweeps += 1
        self._streamed_bytes += streamed_bytes

    def prefilled(self) -> SequencePrefill | None:
        """The event that tells how much of it has been read; None where an earlier one said as much."""
        tokens = self._read_tokens + sum(text.computed for text in self.live)
        if tokens <= self._told:
            return None
        self._told = tokens
        return SequencePrefill(self.sequence_id, tokens, self._total_tokens)

    def embeddings(self) -> SequenceEmbeddings:
        """The event with all vectors."""
        matrix = torch.stack([vector for vector in self._vectors if vector is not None])
        values = base64.b64encode(matrix.numpy().astype("<f4").tobytes()).decode()
        return SequenceEmbeddings(self.sequence_id, matrix.shape[0], matrix.shape[1], values)

    def finished(self, reason: FinishReason, error_code: str | None, error: str | None) -> SequenceFinished:
        """Its last event."""
        return SequenceFinished(
            sequence_id=self.sequence_id,
            reason=reason,
            prompt_tokens=self._total_tokens,
            completion_tokens=0,
            sweeps=self._sweeps,
            streamed_bytes=self._streamed_bytes,
            run_s=time.monotonic() - self._began,
            error_code=error_code,
            error=error,
        )

    def _finished(self, total: torch.Tensor, tokens: int) -> torch.Tensor:
        vector = total / tokens if self._pooling is Pooling.MEAN else total
        if self._is_normalised:
            vector = vector / vector.norm().clamp_min(1e-12)
        return vector.float().cpu()


class EmbeddingJobs:
    """The jobs of one engine, oldest first.

    Args:
        scheduler: runs their texts.
        forget: called with the id of a job that has ended.
    """

    def __init__(self, scheduler: Scheduler, forget: Callable[[str], None]) -> None:
        self._scheduler = scheduler
        self._forget = forget
        self._jobs: dict[str, EmbeddingJob] = {}

    @property
    def num_waiting(self) -> int:
        """Texts that are not under way."""
        return sum(len(job.waiting) for job in self._jobs.values())

    def add(self, job: EmbeddingJob) -> None:
        """Take in a job that has arrived."""
        self._jobs[job.sequence_id] = job

    def of(self, sequence: Sequence | str) -> EmbeddingJob | None:
        """The job that a sequence, or an id, belongs to."""
        return self._jobs.get(sequence if isinstance(sequence, str) else sequence.sequence_id)

    def feed(self) -> None:
        """Start texts while there are places for them; each job has one under way in any case."""
        scheduler = self._scheduler
        places = scheduler.max_sequences - len(scheduler.waiting) - sum(each.places for each in scheduler.running)
        for job in self._jobs.values():
            while job.waiting and (places > 0 or not job.live):
                scheduler.waiting.append(job.start())
                places -= 1

    def advance(
        self, rides: list[Ride], hidden: torch.Tensor, last_rows: list[int], swept_bytes: int
    ) -> list[SequenceEvent]:
        """Hand over a sweep's rows, [T, width], the last one of ``rides[i]`` at ``last_rows[i]``; what became of jobs.

        Rides of sequences that belong to no job are passed over.
        """
        rode: dict[str, EmbeddingJob] = {}
        for ride, last in zip(rides, last_rows, strict=True):
            job = self.of(ride.sequence)
            if job is None:
                continue
            rode[job.sequence_id] = job
            rows = hidden[last + 1 - len(ride.span.token_ids) : last + 1]
            job.pool(ride.sequence, ride.span.start, rows, completes=ride.completes)
            if ride.completes:
                self._scheduler.remove(ride.sequence)
        events: list[SequenceEvent] = []
        for job in rode.values():
            job.ride(swept_bytes)
            if job.is_complete:
                events += self.end(job, FinishReason.STOP)
            elif (progress := job.prefilled()) is not None:
                events.append(progress)
        return events

    def end(
        self, job: EmbeddingJob, reason: FinishReason, error_code: str | None = None, error: str | None = None
    ) -> list[SequenceEvent]:
        """Let a job go, with those of its texts that are under way; its last events."""
        for text in job.live:
            self._scheduler.remove(text)
        del self._jobs[job.sequence_id]
        self._forget(job.sequence_id)
        if reason is FinishReason.STOP and not job.is_finite:
            return [job.finished(FinishReason.ERROR, "not_finite", NOT_FINITE)]
        events: list[SequenceEvent] = [job.embeddings()] if reason is FinishReason.STOP else []
        return [*events, job.finished(reason, error_code, error)]
