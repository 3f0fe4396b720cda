"""Who is told what happens to jobs on this worker, without having a say in it: metrics and traces.

Owns the moments that are told of, and that a watcher which fails is left out from then on while the jobs go on.
`session`, `publisher`, `delivery` and `reconciler` tell; `metrics_jobs` and `job_traces` listen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamella.messages import JobEvent
    from lamella_worker.running_job import Outcome, RunningJob

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claimed:
    """What is known of a job when it is claimed.

    Attributes:
        accepted_at: when Redis took it, Unix seconds by Redis's clock; None where that could not be read.
        waited_s: seconds from then to the claim.
        events: how many events earlier claims have stored.
        trace: the W3C traceparent of whoever submitted it, None if there is none.
    """

    accepted_at: float | None
    waited_s: float | None
    events: int
    trace: str | None


class JobWatch:
    """Watches nothing; those that do override what they want to know.

    Attributes:
        needs_times: `claimed` is to be told since when the job has waited, which costs a question to Redis.
    """

    needs_times = False

    def claimed(self, job: RunningJob, claim: Claimed) -> None:
        """A job is this worker's, for one attempt."""

    def swept(self, model: str, sweep_seconds: Sequence[float], num_jobs: int) -> None:
        """Sweeps of a model took so long; events for so many jobs are stored next."""

    def prefilled(self, job: RunningJob, done_tokens: int, all_tokens: int) -> None:
        """A job's prompt is read so far."""

    def stored(self, job: RunningJob, events: Sequence[JobEvent]) -> None:
        """A job's next events are in its stream, for good."""

    def fenced(self, job: RunningJob) -> None:
        """A write was refused, because the job is not this worker's any more."""

    def left(self, job: RunningJob, outcome: Outcome) -> None:
        """The attempt is over."""

    def dead(self, job_id: str, model: str) -> None:
        """A job of a model was failed because its attempts were used up."""

    def nudged(self, num_jobs: int) -> None:
        """The messages of so many jobs were sent again."""


NO_WATCH = JobWatch()


class JobWatchers(JobWatch):
    """Tells several watchers; one that raises is told nothing any more."""

    def __init__(self, watchers: Sequence[JobWatch]) -> None:
        self._watchers = tuple(watchers)
        self.needs_times = any(watcher.needs_times for watcher in watchers)

    def claimed(self, job: RunningJob, claim: Claimed) -> None:
        """See `JobWatch`."""
        self._tell(lambda watcher: watcher.claimed(job, claim))

    def swept(self, model: str, sweep_seconds: Sequence[float], num_jobs: int) -> None:
        """See `JobWatch`."""
        self._tell(lambda watcher: watcher.swept(model, sweep_seconds, num_jobs))

    def prefilled(self, job: RunningJob, done_tokens: int, all_tokens: int) -> None:
        """See `JobWatch`."""
        self._tell(lambda watcher: watcher.prefilled(job, done_tokens, all_tokens))

    def stored(self, job: RunningJob, events: Sequence[JobEvent]) -> None:
        """See `JobWatch`."""
        self._tell(lambda watcher: watcher.stored(job, events))

    def fenced(self, job: RunningJob) -> None:
        """See `JobWatch`."""
        self._tell(lambda watcher: watcher.fenced(job))

    def left(self, job: RunningJob, outcome: Outcome) -> None:
        """See `JobWatch`."""
        self._tell(lambda watcher: watcher.left(job, outcome))

    def dead(self, job_id: str, model: str) -> None:
        """See `JobWatch`."""
        self._tell(lambda watcher: watcher.dead(job_id, model))

    def nudged(self, num_jobs: int) -> None:
        """See `JobWatch`."""
        self._tell(lambda watcher: watcher.nudged(num_jobs))

    def _tell(self, what: Callable[[JobWatch], None]) -> None:
        for watcher in self._watchers:
            try:
                what(watcher)
            except Exception:
                # Whatever is wrong with a figure is no reason to fail the job that it is about.
                log.exception("%s failed and is left out until the worker is restarted", type(watcher).__name__)
                self._watchers = tuple(other for other in self._watchers if other is not watcher)
