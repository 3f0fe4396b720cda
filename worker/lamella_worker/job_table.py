"""The jobs this process holds, by sequence; shared by tasks, publisher, lease keeper, heartbeat and drain.

Owns membership and its lock only. A job id is held from before its claim to after its last word, so that a second
delivery of the same job to this process is seen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lamella_worker.running_job import RunningJob


class JobTable:
    """Thread-safe membership of running jobs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held_ids: set[str] = set()
        self._by_sequence: dict[str, RunningJob] = {}
        self._busy_since: float | None = None

    @contextmanager
    def hold(self, job_id: str) -> Iterator[bool]:
        """Hold a job id for the time of a task; yields False if this process holds it already."""
        with self._lock:
            is_ours = job_id not in self._held_ids
            if is_ours:
                self._held_ids.add(job_id)
        try:
            yield is_ours
        finally:
            if is_ours:
                with self._lock:
                    self._held_ids.discard(job_id)

    @contextmanager
    def listed(self, job: RunningJob) -> Iterator[None]:
        """List a claimed job for the time of the block, so that its lease is kept and its events find it."""
        with self._lock:
            if not self._by_sequence:
                self._busy_since = time.time()
            self._by_sequence[job.sequence_id] = job
        try:
            yield
        finally:
            with self._lock:
                self._by_sequence.pop(job.sequence_id, None)
                if not self._by_sequence:
                    self._busy_since = None

    def find(self, sequence_id: str) -> RunningJob | None:
        """Return the listed job of a sequence, or None."""
        with self._lock:
            return self._by_sequence.get(sequence_id)

    def jobs(self) -> list[RunningJob]:
        """Return the listed jobs, oldest first."""
        with self._lock:
            return list(self._by_sequence.values())

    @property
    def busy_since(self) -> float | None:
        """Unix seconds since when there has been at least one job without a break; None while idle."""
        with self._lock:
            return self._busy_since
