"""The newest jobs of the listing that one may see: a user's, in one state, or all.

Does no I/O (see `lamella.steps`). Neighbours: `job_routes`; `lamella.records` (reads a record).
"""

from __future__ import annotations

import logging

from lamella.errors import DecodeError
from lamella.keys import JOBS_LISTED, Keys
from lamella.messages import JobState, JobStatus
from lamella.records import STATUS_FIELDS, decode_status
from lamella.steps import Operation, answers, commands

log = logging.getLogger(__name__)


def find_jobs(keys: Keys, limit: int, user: str | None, state: JobState | None) -> Operation[list[JobStatus]]:
    """Return the newest jobs, newest first, at most `limit`; None is every user, every state.

    Of all jobs only user and state are read; records that expired or are of another version are left out.
    """
    listed = yield commands(("ZREVRANGE", keys.jobs, 0, JOBS_LISTED - 1))
    ids = [str(job_id) for job_id in answers(answers(listed)[0])]
    if ids and (user is not None or state is not None):
        heads = answers((yield commands(*(("HMGET", keys.job(job_id), "user", "state") for job_id in ids))))
        ids = [job_id for job_id, head in zip(ids, heads, strict=True) if _fits(answers(head), user, state)]
    ids = ids[:limit]
    if not ids:
        return []
    records = answers((yield commands(*(("HMGET", keys.job(job_id), *STATUS_FIELDS) for job_id in ids))))
    found = (_decoded(job_id, answers(values)) for job_id, values in zip(ids, records, strict=True))
    return [job for job in found if job is not None]


def read_cost(keys: Keys, job_id: str) -> Operation[int]:
    """Return how many tokens a job may take, prompt included, as estimated when it was submitted; 0 if unknown."""
    raw = answers(answers((yield commands(("HMGET", keys.job(job_id), "cost"))))[0])[0]
    return int(str(raw)) if raw is not None and str(raw).isdecimal() else 0


def _fits(head: list[object], user: str | None, state: JobState | None) -> bool:
    return (user is None or head[0] == user) and (state is None or head[1] == state.value)


def _decoded(job_id: str, values: list[object]) -> JobStatus | None:
    try:
        return decode_status(job_id, values)
    except DecodeError as error:
        log.debug("left out of the listing: %s", error)
        return None
