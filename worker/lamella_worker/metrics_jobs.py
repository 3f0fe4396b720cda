"""Metrics of what happens to jobs on this worker: latencies, tokens, attempts, refused writes.

Owns those metrics and their meaning; `job_watch` brings the moments, `metrics_engine` has the engine's own figures,
`metrics_fleet` those of all workers together. Labels are the model and closed sets, never a job, a user or a name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from lamella.messages import Cancelled, Done, Failed, TokenEvent
from lamella_worker.job_watch import Claimed, JobWatch
from lamella_worker.running_job import Outcome, RunningJob

_SWEEP_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_WAIT_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000)


class _Progress:
    """Where one attempt's latencies are counted from, in seconds of the monotonic clock."""

    def __init__(self, accepted_s: float | None) -> None:
        self.accepted_s = accepted_s  # None once the first token is there, or where nobody knows
        self.last_token_s: float | None = None


class JobMetrics(JobWatch):
    """Counts in `registry`, for one model; safe to use from any thread."""

    needs_times = True

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"lamella_{name}", meaning, ("model", *labels), registry=registry)

        def histogram(name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
            full = Histogram(f"lamella_{name}_seconds", meaning, ("model",), registry=registry, buckets=buckets)
            return full.labels(model)

        self._first_token = histogram("time_to_first_token", "From a job's acceptance to its first token.", _WAIT_S)
        self._between = histogram("inter_token", "Between two tokens of a job within one attempt.", _TOKEN_S)
        self._queue_wait = histogram("queue_wait", "From a job's acceptance to its first claim.", _WAIT_S)
        self._sweeps = histogram("sweep", "Length of a sweep.", _SWEEP_S)
        self._tokens = counter("tokens", "Tokens stored in the streams of jobs, each once.").labels(model)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of jobs that ended well.").labels(model)
        self._attempts = counter("attempts", "Jobs claimed, once for each attempt.").labels(model)
        self._fenced = counter("fenced_writes", "Writes refused because the job was not ours any more.").labels(model)
        self._dead = counter("dead_jobs", "Jobs failed because their attempts were used up.").labels(model)
        self._nudges = counter("nudges", "Messages sent again for jobs that looked lost, of any model.").labels(model)
        ended = counter("attempts_ended", "Attempts that are over, by how.", "outcome")
        self._ended = {outcome: ended.labels(model, outcome.value.replace(" ", "_")) for outcome in Outcome}
        jobs = counter("jobs", "Jobs that came to their end here, by how.", "state")
        self._jobs = {kind: jobs.labels(model, kind) for kind in ("done", "failed", "cancelled")}
        self._lock = threading.Lock()
        self._running: dict[str, _Progress] = {}  # by sequence: as many as there are slots

    def claimed(self, job: RunningJob, claim: Claimed) -> None:
        """See `JobWatch`."""
        self._attempts.inc()
        if claim.waited_s is not None and job.fence == 1:
            self._queue_wait.observe(claim.waited_s)
        is_new = claim.waited_s is not None and claim.events == 0
        progress = _Progress(time.monotonic() - (claim.waited_s or 0.0) if is_new else None)
        with self._lock:
            self._running[job.sequence_id] = progress

    def swept(self, sweep_seconds: Sequence[float], num_jobs: int) -> None:
        """See `JobWatch`."""
        for seconds in sweep_seconds:
            self._sweeps.observe(seconds)

    def stored(self, job: RunningJob, events: Sequence[TokenEvent | Done | Failed | Cancelled]) -> None:
        """See `JobWatch`."""
        for event in events:
            match event:
                case TokenEvent():
                    self._count_tokens(job, len(event.token_ids))
                case Done():
                    self._prompt_tokens.inc(event.usage.prompt_tokens)
                    self._jobs[event.type].inc()
                case Failed() | Cancelled():
                    self._jobs[event.type].inc()

    def fenced(self, job: RunningJob) -> None:
        """See `JobWatch`."""
        self._fenced.inc()

    def left(self, job: RunningJob, outcome: Outcome) -> None:
        """See `JobWatch`."""
        with self._lock:
            self._running.pop(job.sequence_id, None)
        self._ended[outcome].inc()

    def dead(self, job_id: str) -> None:
        """See `JobWatch`."""
        self._dead.inc()
        self._jobs["failed"].inc()

    def nudged(self, num_jobs: int) -> None:
        """See `JobWatch`."""
        self._nudges.inc(num_jobs)

    def _count_tokens(self, job: RunningJob, num_tokens: int) -> None:
        self._tokens.inc(num_tokens)
        now = time.monotonic()
        with self._lock:
            progress = self._running.get(job.sequence_id)
        if progress is None or not num_tokens:
            return
        if progress.accepted_s is not None:
            self._first_token.observe(now - progress.accepted_s)
            progress.accepted_s = None
        elif progress.last_token_s is not None:
            self._between.observe(now - progress.last_token_s)
        progress.last_token_s = now
