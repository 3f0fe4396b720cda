"""How a run of many jobs ends before its tasks do: what waits is given up, what runs is waited for or stopped.

Owns the operations on single jobs that this takes; does no I/O. Neighbour: `map_run`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from lamella import operations
from lamella.errors import JobNotFound, LamellaError
from lamella.keys import Keys
from lamella.messages import JobState
from lamella.steps import Operation, answers, commands


class Closing(NamedTuple):
    """Why tasks are given up (`error`, the outcome of each), and whether jobs that run already are stopped as well.

    `searched` counts the tasks whose jobs an earlier run may have sent; they are looked for, and followed if found.
    """

    error: LamellaError
    stops_running: bool = False
    searched: int = 0


class Named(Protocol):
    """A request with a name that finds its job again."""

    @property
    def idempotency_key(self) -> str | None:
        """The name."""


class Drafts(Protocol):
    """A task, as far as its jobs are looked for."""

    def draft(self, attempt: int) -> Named:
        """Return the request of an attempt; raises LamellaError where there can be none."""


def prior_job(keys: Keys, idempotency_key: str) -> Operation[str | None]:
    """Return the job that an idempotency key belongs to, None if it is new."""
    raw = yield commands(("HMGET", keys.idempotency(idempotency_key), "job"))
    job_id = answers(answers(raw)[0])[0]
    return None if job_id is None else str(job_id)


def find_job(keys: Keys, task: Drafts, attempts: int) -> Operation[str | None]:
    """Return the job that an earlier run sent for a task, None if it sent none or they were cancelled."""
    for attempt in range(attempts):
        try:
            name = task.draft(attempt).idempotency_key
        except LamellaError:
            return None
        job_id = None if name is None else (yield from prior_job(keys, name))
        if job_id is None:
            return None
        raw = yield commands(("HMGET", keys.job(job_id), "state"))
        if answers(answers(raw)[0])[0] not in (None, JobState.CANCELLED.value):
            return job_id
    return None


def stop_job(keys: Keys, job_id: str, closing: Closing) -> Operation[bool]:
    """Cancel a job that has not begun, and one that runs if the closing says so; return whether it was."""
    if not closing.stops_running:
        raw = yield commands(("HMGET", keys.job(job_id), "state"))
        if answers(answers(raw)[0])[0] == JobState.RUNNING.value:
            return False
    try:
        yield from operations.cancel(keys, job_id)
    except JobNotFound:
        return True  # there is nothing to cancel
    return True
