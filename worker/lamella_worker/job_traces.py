"""Traces of jobs on this worker: the wait in the queue, each attempt, and within it prefill and decode.

Owns the spans and what is told of sweeps: a span a sweep would be thousands, so decode has their count and lengths as
attributes, and an event at its sweeps 1, 2, 4, 8, ... with the number of the worker's sweep, by which jobs that rode
together are found together. A job without a traceparent, or one that its client does not sample, has no spans. No text
and no token is in any. `job_watch` brings the moments; `lamella.tracing` begins traces and sends spans.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lamella.messages import Cancelled, Done, Failed, JobEvent, TokenEvent
from lamella_worker.job_watch import Claimed, JobWatch
from lamella_worker.running_job import Outcome, RunningJob

MAX_PREFILL_EVENTS = 32  # parts of a prompt that are told one by one


class _Swept(NamedTuple):
    """The sweeps of one model: how many, how long the last one took, and how many jobs it brought something."""

    sweeps: int = 0
    last_s: float = 0.0
    num_jobs: int = 0


class _Attempt:
    """The open spans of one attempt; written by one thread at a time."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self.span = span
        self._phase: Span | None = None
        self._is_decoding = False
        self._parts = 0
        self._sweeps = self._tokens = 0
        self._last_s = 0.0
        self._longest_s = 0.0
        self._began_s = time.monotonic()

    def prefill(self, done_tokens: int, all_tokens: int) -> None:
        """A part of the prompt was read."""
        self._parts += 1
        if self._phase is None:
            self._begin("lamella.prefill")
        if self._phase is not None and not self._is_decoding and self._parts <= MAX_PREFILL_EVENTS:
            self._phase.add_event("part", {"lamella.tokens_read": done_tokens, "lamella.tokens": all_tokens})

    def begin(self) -> None:
        """The attempt goes to the engine."""
        self._begin("lamella.prefill")

    def tokens(self, num_tokens: int, swept: _Swept) -> None:
        """A sweep brought tokens; the first ones end the prefill."""
        if not self._is_decoding:
            self._end_phase({"lamella.parts": self._parts})
            self._begin("lamella.decode")
            self._is_decoding = True
        self._sweeps += 1
        self._tokens += num_tokens
        self._longest_s = max(self._longest_s, swept.last_s)
        if self._phase is not None and self._sweeps & (self._sweeps - 1) == 0:
            about = {
                "lamella.sweep": swept.sweeps,
                "lamella.sweep_s": swept.last_s,
                "lamella.jobs": swept.num_jobs,
                "lamella.tokens": self._tokens,
            }
            self._phase.add_event("sweep", about)

    def end(self, outcome: Outcome) -> None:
        """The attempt is over."""
        if self._is_decoding:
            self._end_phase(
                {
                    "lamella.sweeps": self._sweeps,
                    "lamella.tokens": self._tokens,
                    "lamella.longest_sweep_s": self._longest_s,
                }
            )
        else:
            self._end_phase({"lamella.parts": self._parts})
        self.span.set_attribute("lamella.outcome", outcome.value.replace(" ", "_"))
        self.span.set_attribute("lamella.tokens", self._tokens)
        if outcome in (Outcome.LOST, Outcome.ATTEMPT_FAILED):
            self.span.set_status(Status(StatusCode.ERROR, outcome.value))
        self.span.end()

    def _begin(self, name: str) -> None:
        self._phase = self._tracer.start_span(name, set_span_in_context(self.span))

    def _end_phase(self, attributes: dict[str, int | float]) -> None:
        if self._phase is not None:
            for key, value in attributes.items():
                self._phase.set_attribute(key, value)
            self._phase.end()
            self._phase = None


class JobTraces(JobWatch):
    """Makes spans with `provider`, which its opener shuts down; safe to use from any thread."""

    needs_times = True

    def __init__(self, provider: TracerProvider, model: str, worker: str) -> None:
        self._tracer = provider.get_tracer("lamella_worker")
        self._model = model
        self._about = {"lamella.worker": worker}
        self._propagator = TraceContextTextMapPropagator()
        self._lock = threading.Lock()
        self._attempts: dict[str, _Attempt] = {}  # by sequence: as many as there are slots
        self._swept: dict[str, _Swept] = {}  # by model

    def claimed(self, job: RunningJob, claim: Claimed) -> None:
        """See `JobWatch`."""
        if claim.trace is None:
            return
        context = self._propagator.extract({"traceparent": claim.trace})
        if not get_current_span(context).get_span_context().trace_flags.sampled:
            return
        now_ns = time.time_ns()
        about = {**self._about, "lamella.model": job.model or self._model, "lamella.job": job.job_id}
        if job.fence == 1 and claim.waited_s is not None:
            began_ns = now_ns - int(claim.waited_s * 1e9)
            wait = self._tracer.start_span("lamella.queue", context, attributes=about, start_time=began_ns)
            wait.end(now_ns)
        span = self._tracer.start_span(
            "lamella.attempt",
            context,
            kind=SpanKind.CONSUMER,
            attributes={**about, "lamella.attempt": job.attempts, "lamella.resumed_after_events": claim.events},
            start_time=now_ns,
        )
        attempt = _Attempt(self._tracer, span)
        attempt.begin()
        with self._lock:
            self._attempts[job.sequence_id] = attempt

    def swept(self, model: str, sweep_seconds: Sequence[float], num_jobs: int) -> None:
        """See `JobWatch`."""
        before = self._swept.get(model, _Swept())
        last_s = sweep_seconds[-1] if sweep_seconds else 0.0
        self._swept[model] = _Swept(before.sweeps + len(sweep_seconds), last_s, num_jobs)

    def prefilled(self, job: RunningJob, done_tokens: int, all_tokens: int) -> None:
        """See `JobWatch`."""
        if (attempt := self._find(job)) is not None:
            attempt.prefill(done_tokens, all_tokens)

    def stored(self, job: RunningJob, events: Sequence[JobEvent]) -> None:
        """See `JobWatch`."""
        attempt = self._find(job)
        if attempt is None:
            return
        num_tokens = sum(len(event.token_ids) for event in events if isinstance(event, TokenEvent))
        if num_tokens:
            attempt.tokens(num_tokens, self._swept.get(job.model, _Swept()))
        match events[-1]:
            case Done() as done:
                attempt.span.set_attribute("lamella.prompt_tokens", done.usage.prompt_tokens)
                attempt.span.set_attribute("lamella.sweeps", done.usage.sweeps)
                attempt.span.set_attribute("lamella.streamed_bytes", done.usage.streamed_bytes)
                attempt.span.set_attribute("lamella.finish_reason", done.finish_reason)
            case Failed() as failed:
                attempt.span.set_attribute("lamella.error_code", failed.code)
                attempt.span.set_status(Status(StatusCode.ERROR, failed.code))
            case Cancelled():
                attempt.span.set_attribute("lamella.finish_reason", "cancelled")
            case TokenEvent():
                pass

    def left(self, job: RunningJob, outcome: Outcome) -> None:
        """See `JobWatch`."""
        with self._lock:
            attempt = self._attempts.pop(job.sequence_id, None)
        if attempt is not None:
            attempt.end(outcome)

    def _find(self, job: RunningJob) -> _Attempt | None:
        with self._lock:
            return self._attempts.get(job.sequence_id)
