"""Submits the jobs of a batch on the account of the key that made it; each is reserved for once, whoever resumes it.

Owns the order in which a job is found again, admitted, submitted and tied to its bill. Does no I/O: `map_run` drives
it. Neighbours: `meter` (the scripts), `batch_execution` (whose runs send their jobs so).
"""

from __future__ import annotations

from lamella.errors import LamellaError, QueueFull
from lamella.key_ring import KeyRing
from lamella.keys import Keys
from lamella.map_closing import prior_job
from lamella.map_run import Draft, Submit
from lamella.operations import submit
from lamella.steps import Operation
from lamella_gateway.api_error import ApiError
from lamella_gateway.api_keys import ApiKey
from lamella_gateway.meter import Attachment, Bill, admit, attach, give_back, is_billed
from lamella_gateway.order import draft_cost

QUOTA_RETRY_S = 2.0


def billed_submit(key: ApiKey | None) -> Submit:
    """Return what sends a job, paid for by `key` (None: by nobody).

    What it sends raises as `operations.submit` does, and QueueFull where the key's tokens for the day are used up: then
    the job waits.
    """

    def send(keys: Keys, draft: Draft, ring: KeyRing | None) -> Operation[str]:
        if key is None:
            return (yield from submit(keys, draft, ring))
        before = None if draft.idempotency_key is None else (yield from prior_job(keys, draft.idempotency_key))
        if before is not None and (yield from is_billed(keys, before)):
            return before
        bill = yield from _reserve(keys, key, draft_cost(draft))
        try:
            job_id = yield from submit(keys, draft, ring)
        except LamellaError:
            yield from give_back(keys, bill)
            raise
        if not (yield from attach(keys, job_id, Attachment(bill))):
            yield from give_back(keys, bill)  # an earlier run's, which has expired
        return job_id

    return send


def _reserve(keys: Keys, key: ApiKey, tokens: int) -> Operation[Bill]:
    try:
        day = yield from admit(keys, key, tokens, is_paced=False)
    except ApiError as error:
        raise QueueFull(error.message, QUOTA_RETRY_S) from error
    return Bill(key.key_id, day, tokens)
