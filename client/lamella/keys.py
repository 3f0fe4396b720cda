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
``generate.{model}``        list     Celery's queue of job ids for one model: those in flight that no worker has yet
``queues``                  set      models that have jobs waiting or in flight
``ready:{model}:{class}``   zset     users with waiting jobs, scored by virtual time; ``held:...`` and ``spent:...``
                                     are alike: all are described at the head of ``lua/_queue.lua``, which names them
``flight:{model}``          zset     ids of jobs sent to Celery or running, scored by when they were sent (Unix ms)
``queue:{model}``           hash     the queue's virtual times and counters
``share:{model}:{user}``    hash     a user's queued and sent jobs and their tokens
``serving:{model}``         hash     worker to its slots and its last sign of life
``capacity:{model}``        string   slots of all of them, with a time to live
``deadlines``               zset     ids of jobs that wait under a deadline, scored by it (Unix ms)
``pulls:{worker}``          list     PullRequest JSON: models that the worker is asked to bring into its host's store
``pull:{worker}:{model}``   string   PullStatus JSON: how far it is; with a time to live
``limits``                  hash     limits of models and users; ``limits:{user}`` one user's own, and their weight
``apikey:{id}``             hash     an API key of the HTTP gateway: hash of its secret, user, scopes, quotas
``apikeys``                 zset     ids of all API keys, scored by creation (Unix ms)
``apirate:{id}``            string   when the key's next request is due (Unix ms), as long as that limits it
``apiday:{id}:{day}``       string   tokens a key used or reserved on a day (days since 1970, UTC)
``apiuse:{id}``             hash     requests and tokens of a key since its creation
``unbilled``                hash     job id to ``key day reserved``: jobs of the gateway whose use is not booked yet
``httpretry:{digest}``      string   job ids that a request sent again by an SDK goes on with
==========================  =======  =============================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_PREFIX = "lamella:"
TRACE_HEADER = "traceparent"  # of a Celery message, W3C trace context
TASK_NAME = "lamella.generate"

FINISHED_TTL_S = 6 * 3600  # a finished job's record and stream stay readable this long
IDEMPOTENCY_TTL_S = 24 * 3600
WORKER_TTL_S = 15  # a worker whose heartbeat is older is gone
HEARTBEAT_S = 2.0
JOBS_LISTED = 1000  # the newest jobs kept in the listing
MAX_QUEUED = 10_000  # per model, unless limits say otherwise; one more is refused
POISON_ATTEMPTS = 3
PULLS_ASKED = 16  # requests that a worker has not taken yet
PULL_ASK_TTL_S = 60
PULL_LIVE_TTL_S = 15  # a pull of which nothing is told for longer has ended with its worker
PULL_TOLD_TTL_S = 3600
HTTP_RETRY_TTL_S = 600  # so long a request that is sent again finds the jobs of the first time


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

    def serving(self, model: str) -> str:
        """Hash of the model's workers and their slots."""
        return f"{self.prefix}serving:{model}"

    def queue_book(self, model: str) -> str:
        """Hash of the model's queue: its virtual times and counters."""
        return f"{self.prefix}queue:{model}"

    def capacity(self, model: str) -> str:
        """String with the slots of all of the model's workers."""
        return f"{self.prefix}capacity:{model}"

    def queue(self, model: str) -> str:
        """Hash of the model's queue: its virtual times and counters."""
        return f"{self.prefix}queue:{model}"

    def flight(self, model: str) -> str:
        """Sorted set of the model's jobs that were sent to Celery and have not ended."""
        return f"{self.prefix}flight:{model}"

    def pulls(self, worker: str) -> str:
        """List of requests that a worker bring a model."""
        return f"{self.prefix}pulls:{worker}"

    def pull(self, worker: str, model: str) -> str:
        """String that tells how far a worker is with a model it was asked to bring."""
        return f"{self.prefix}pull:{worker}:{model}"

    def user_limits(self, user: str) -> str:
        """Hash of one user's own limits and weight."""
        return f"{self.prefix}limits:{user}"

    def api_key(self, key_id: str) -> str:
        """Hash of an API key."""
        return f"{self.prefix}apikey:{key_id}"

    def api_use(self, key_id: str) -> str:
        """Hash of what an API key has used."""
        return f"{self.prefix}apiuse:{key_id}"

    def api_day(self, key_id: str, day: int) -> str:
        """String with the tokens an API key has used or reserved on a day."""
        return f"{self.prefix}apiday:{key_id}:{day}"

    def http_retry(self, digest: str) -> str:
        """String with the job ids of a request that an SDK may send again."""
        return f"{self.prefix}httpretry:{digest}"

    @property
    def api_keys(self) -> str:
        """Sorted set of the ids of all API keys."""
        return f"{self.prefix}apikeys"

    @property
    def unbilled(self) -> str:
        """Hash of the gateway's jobs whose use is not booked yet."""
        return f"{self.prefix}unbilled"

    @property
    def limits(self) -> str:
        """Hash of the limits that hold for all models and users."""
        return f"{self.prefix}limits"

    @property
    def queues(self) -> str:
        """Set of models that have jobs waiting or in flight."""
        return f"{self.prefix}queues"

    @property
    def deadlines(self) -> str:
        """Sorted set of jobs that wait under a deadline."""
        return f"{self.prefix}deadlines"

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
