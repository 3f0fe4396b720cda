"""Metrics of what happens to jobs on this worker: latencies, tokens, attempts, refused writes.

Owns those metrics and their meaning; `job_watch` brings the moments, `metrics_engine` has the engine's own figures,
`metrics_fleet` those of all workers together. Labels are the model and closed sets, never a job, a user or a name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from lamella.messages import Cancelled, Done, Failed, JobEvent, TokenEvent
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


class _Series:
    """The series of one model."""

    def __init__(self, families: _Families, model: str) -> None:
        self.first_token = families.first_token.labels(model)
        self.between = families.between.labels(model)
        self.queue_wait = families.queue_wait.labels(model)
        self.sweeps = families.sweeps.labels(model)
        self.tokens = families.tokens.labels(model)
        self.prompt_tokens = families.prompt_tokens.labels(model)
        self.attempts = families.attempts.labels(model)
        self.fenced = families.fenced.labels(model)
        self.dead = families.dead.labels(model)
        self.nudges = families.nudges.labels(model)
        self.ended = {outcome: families.ended.labels(model, outcome.value.replace(" ", "_")) for outcome in Outcome}
        self.jobs = {kind: families.jobs.labels(model, kind) for kind in ("done", "failed", "cancelled")}


class _Families:
    """The metrics, registered once for all models."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"lamella_{name}", meaning, ("model", *labels), registry=registry)

        def histogram(name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"lamella_{name}_seconds", meaning, ("model",), registry=registry, buckets=buckets)

        self.first_token = histogram("time_to_first_token", "From a job's acceptance to its first token.", _WAIT_S)
        self.between = histogram("inter_token", "Between two tokens of a job within one attempt.", _TOKEN_S)
        self.queue_wait = histogram("queue_wait", "From a job's acceptance to its first claim.", _WAIT_S)
        self.sweeps = histogram("sweep", "Length of a sweep.", _SWEEP_S)
        self.tokens = counter("tokens", "Tokens stored in the streams of jobs, each once.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of jobs that ended well.")
        self.attempts = counter("attempts", "Jobs claimed, once for each attempt.")
        self.fenced = counter("fenced_writes", "Writes refused because the job was not ours any more.")
        self.dead = counter("dead_jobs", "Jobs failed because their attempts were used up.")
        self.nudges = counter("nudges", "Messages sent again for jobs that looked lost, of any model.")
        self.ended = counter("attempts_ended", "Attempts that are over, by how.", "outcome")
        self.jobs = counter("jobs", "Jobs that came to their end here, by how.", "state")


class JobMetrics(JobWatch):
    """Counts in `registry`, by model; safe to use from any thread.

    `models` are those whose series are there from the start; what concerns none of them counts for the first.
    """

    needs_times = True

    def __init__(self, registry: CollectorRegistry, *models: str) -> None:
        self._families = _Families(registry)
        self._lock = threading.Lock()
        self._series = {model: _Series(self._families, model) for model in models}
        self._first = models[0]
        self._running: dict[str, _Progress] = {}  # by sequence: as many as there are slots

    def claimed(self, job: RunningJob, claim: Claimed) -> None:
        """See `JobWatch`."""
        series = self._of(job.model)
        series.attempts.inc()
        if claim.waited_s is not None and job.fence == 1:
            series.queue_wait.observe(claim.waited_s)
        is_new = claim.waited_s is not None and claim.events == 0
        progress = _Progress(time.monotonic() - (claim.waited_s or 0.0) if is_new else None)
        with self._lock:
            self._running[job.sequence_id] = progress

    def swept(self, model: str, sweep_seconds: Sequence[float], num_jobs: int) -> None:
        """See `JobWatch`."""
        for seconds in sweep_seconds:
            self._of(model).sweeps.observe(seconds)

    def stored(self, job: RunningJob, events: Sequence[JobEvent]) -> None:
        """See `JobWatch`."""
        series = self._of(job.model)
        for event in events:
            match event:
                case TokenEvent():
                    self._count_tokens(series, job, len(event.token_ids))
                case Done():
                    series.prompt_tokens.inc(event.usage.prompt_tokens)
                    series.jobs[event.type].inc()
                case Failed() | Cancelled():
                    series.jobs[event.type].inc()

    def fenced(self, job: RunningJob) -> None:
        """See `JobWatch`."""
        self._of(job.model).fenced.inc()

    def left(self, job: RunningJob, outcome: Outcome) -> None:
        """See `JobWatch`."""
        with self._lock:
            self._running.pop(job.sequence_id, None)
        self._of(job.model).ended[outcome].inc()

    def dead(self, job_id: str, model: str) -> None:
        """See `JobWatch`."""
        series = self._of(model)
        series.dead.inc()
        series.jobs["failed"].inc()

    def nudged(self, num_jobs: int) -> None:
        """See `JobWatch`."""
        self._of(self._first).nudges.inc(num_jobs)

    def _of(self, model: str) -> _Series:
        model = model or self._first
        with self._lock:
            series = self._series.get(model)
            if series is None:
                series = self._series[model] = _Series(self._families, model)
        return series

    def _count_tokens(self, series: _Series, job: RunningJob, num_tokens: int) -> None:
        series.tokens.inc(num_tokens)
        now = time.monotonic()
        with self._lock:
            progress = self._running.get(job.sequence_id)
        if progress is None or not num_tokens:
            return
        if progress.accepted_s is not None:
            series.first_token.observe(now - progress.accepted_s)
            progress.accepted_s = None
        elif progress.last_token_s is not None:
            series.between.observe(now - progress.last_token_s)
        progress.last_token_s = now
