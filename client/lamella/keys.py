"""Every Redis key, channel, queue name and time to live, in one place.

==========================  =======  =============================================================================
key (after the prefix)      type     holds
==========================  =======  =============================================================================
``job:{id}``                hash     the job's record; fields are listed at the head of ``lua/submit.lua``
``tok:{id}``                stream   stored events, entry id ``<seq>-0``, field ``e``
``ch:{id}``                 channel  the same events live, as ``<seq> <json>``; progress as ``- <json>``
``active``                  zset     ids of jobs that have not ended, scored by creation (Unix ms)
``jobs``                    zset     ids of the newest jobs, scored by creation (Unix ms)
``idem:{key}``              hash     ``job`` and ``hash`` of the request an idempotency key belongs to
``worker:{name}``           string   WorkerInfo JSON, with a time to live
``workers``                 zset     worker names scored by last heartbeat (Unix ms)
``reconciler``              string   name of the worker that reconciles now
``generate.{model}``        list     Celery's queue of job ids for one model
==========================  =======  =============================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_PREFIX = "lamella:"
TASK_NAME = "lamella.generate"

FINISHED_TTL_S = 6 * 3600  # a finished job's record and stream stay readable this long
IDEMPOTENCY_TTL_S = 24 * 3600
WORKER_TTL_S = 15  # a worker whose heartbeat is older is gone
HEARTBEAT_S = 2.0
JOBS_LISTED = 1000  # the newest jobs kept in the listing
MAX_QUEUED = 10_000  # per model; one more is refused
POISON_ATTEMPTS = 3


@dataclass(frozen=True)
class Keys:
    """Key names under one prefix, which Celery has as ``global_keyprefix``, and how long ended jobs are kept."""

    prefix: str = DEFAULT_PREFIX
    finished_ttl_s: int = FINISHED_TTL_S

    @property
    def idempotency_ttl_s(self) -> int:
        """How long an idempotency key stands for its job: a day, or less where ended jobs are kept for less."""
        return min(IDEMPOTENCY_TTL_S, 4 * self.finished_ttl_s)

    def job(self, job_id: str) -> str:
        """Hash of the job's record."""
        return f"{self.prefix}job:{job_id}"

    def stream(self, job_id: str) -> str:
        """Stream of the job's stored events."""
        return f"{self.prefix}tok:{job_id}"

    def channel(self, job_id: str) -> str:
        """Pub/sub channel of the job's live events."""
        return f"{self.prefix}ch:{job_id}"

    def idempotency(self, key: str) -> str:
        """Hash that ties an idempotency key to its job."""
        return f"{self.prefix}idem:{key}"

    def worker(self, name: str) -> str:
        """String holding a worker's heartbeat."""
        return f"{self.prefix}worker:{name}"

    def queue_list(self, model: str) -> str:
        """Redis list behind the model's Celery queue."""
        return self.prefix + queue_name(model)

    @property
    def active(self) -> str:
        """Sorted set of jobs that have not ended."""
        return f"{self.prefix}active"

    @property
    def jobs(self) -> str:
        """Sorted set of the newest jobs, for listings."""
        return f"{self.prefix}jobs"

    @property
    def workers(self) -> str:
        """Sorted set of worker names by last heartbeat."""
        return f"{self.prefix}workers"

    @property
    def reconciler(self) -> str:
        """Lock held by the worker that reconciles."""
        return f"{self.prefix}reconciler"


def queue_name(model: str) -> str:
    """Celery's name of the model's queue (without the prefix)."""
    return f"generate.{model}"
