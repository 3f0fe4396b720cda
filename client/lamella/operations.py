"""What the clients do with the registry, each exchange once: submit, status, cancel, and the listings.

Owns the order of steps and the meaning of their answers; does no I/O (see `steps`). Neighbours: `registry_calls` and
`records` below, `client` and `async_client` above.
"""

from __future__ import annotations

import time
import uuid

from lamella.admission import refusal
from lamella.candidates import rank
from lamella.embed_draft import EmbedDraft
from lamella.embedding import EmbedRequest
from lamella.errors import (
    DecodeError,
    EncryptionError,
    IdempotencyConflict,
    JobNotFound,
    NoWorkerError,
    QueueFull,
    RequestError,
)
from lamella.job_seal import seal_request
from lamella.key_ring import KeyRing
from lamella.keys import JOBS_LISTED, Keys
from lamella.messages import Failed, GenerateRequest, JobStatus, ModelInfo, WorkerInfo
from lamella.queue_calls import Outlook, outlook_call
from lamella.queue_terms import QueueTerms
from lamella.records import STATUS_FIELDS, decode_status, decode_workers, log
from lamella.registry_calls import (
    ATTEMPTS_EXHAUSTED,
    CancelStatus,
    Idempotency,
    RetryStatus,
    SubmitStatus,
    cancel_call,
    retry_call,
    served_only,
    submit_call,
)
from lamella.request_draft import RequestDraft
from lamella.steps import Operation, answers, commands
from lamella.tracing import submission

MAX_WORKERS_LISTED = 1000


def submit(keys: Keys, draft: RequestDraft | EmbedDraft, ring: KeyRing | None = None) -> Operation[str]:
    """Accept a job and return its id; an idempotency key seen before returns the job it belongs to.

    With `ring` the request is stored encrypted, and so is everything the job will say.

    Raises:
        NoWorkerError: the draft requires a live worker for its model and there is none.
        RequestError: no model is named and not exactly one is served.
        IdempotencyConflict: the key belongs to another request.
        EncryptionError: live workers serve the model, but none of them has the key in use.
        QueueFull: the model's queue, or one of the user's limits (UserLimitReached), is at its bound.
        DeadlineHopeless: the job's deadline would pass first.
    """
    idempotency = None
    if draft.idempotency_key is not None:
        hashes = (draft.request_hash(),) if ring is None else ring.fingerprints(draft.request_hash())
        idempotency = Idempotency(draft.idempotency_key, hashes[0])
        prior = yield commands(("HMGET", keys.idempotency(idempotency.key), "job", "hash"))
        if job_id := _prior_job(answers(prior)[0], idempotency.key, hashes):
            return job_id
    if draft.model is not None and ring is None:  # the script looks for a worker by itself, in the same round trip
        request = draft.request(draft.model)
        sent = yield from _send(keys, request, draft.terms, idempotency, ring, must_be_served=draft.require_worker)
        if sent is not None:
            return sent
    model = yield from choose_model(keys, draft)
    if ring is not None and draft.require_worker:
        yield from _check_key(keys, ring.key_id, model)
    sent = yield from _send(keys, draft.request(model), draft.terms, idempotency, ring)
    if sent is None:
        raise DecodeError("the server says that no worker serves the model, which it was not asked")
    return sent


def _send(
    keys: Keys,
    request: GenerateRequest | EmbedRequest,
    terms: QueueTerms,
    idempotency: Idempotency | None,
    ring: KeyRing | None,
    *,
    must_be_served: bool = False,
) -> Operation[str | None]:
    """Send the job and return its id; None where no live worker serves the model and one must."""
    job_id = uuid.uuid4().hex
    stored = seal_request(ring, job_id, request.model_dump_json(exclude_none=True)) if ring is not None else None
    with submission("lamella.submit", request.model) as trace:
        call = submit_call(keys, job_id, request, terms, idempotency, stored, trace.traceparent)
        call = served_only(call) if must_be_served else call
        reply = call.decode((yield call))
        trace.accepted(reply.job_id, reply.status.value)
    match reply.status:
        case SubmitStatus.UNSERVED:
            return None
        case SubmitStatus.CREATED | SubmitStatus.EXISTS | SubmitStatus.DUPLICATE:
            return reply.job_id
        case SubmitStatus.CONFLICT:
            raise _conflict(idempotency.key if idempotency else "", reply.job_id)
        case SubmitStatus.FULL | SubmitStatus.USER_FULL | SubmitStatus.USER_TOKENS | SubmitStatus.HOPELESS:
            raise refusal(reply, request.model, terms)


def _prior_job(answer: object, key: str, hashes: tuple[str, ...]) -> str | None:
    job_id, request_hash = answers(answer)
    if job_id is None:
        return None
    if request_hash not in hashes:
        raise _conflict(key, str(job_id))
    return str(job_id)


def _conflict(key: str, job_id: str) -> IdempotencyConflict:
    return IdempotencyConflict(
        f"idempotency key {key!r} belongs to job {job_id}, which is another request; "
        "use a new key for a new request, or repeat the request unchanged"
    )


def _check_key(keys: Keys, key_id: str, model: str) -> Operation[None]:
    """Refuse a job that no worker of its model could open now; it would wait without a word."""
    live = [worker for worker in (yield from workers(keys)) if any(each.name == model for each in worker.served)]
    held = {key for worker in live for key in worker.key_ids}
    if key_id not in held:
        raise EncryptionError(
            f"no live worker of {model!r} has the encryption key {key_id!r}; the keys they have: "
            f"{', '.join(sorted(held)) or 'none'}. Give client and workers the same encryption key file, or submit "
            "with require_worker=False to let the job wait for a worker that has it."
        )


def _served(live: list[WorkerInfo]) -> tuple[str, ...]:
    return tuple(sorted({model.name for worker in live if not worker.draining for model in worker.served}))


def choose_model(keys: Keys, draft: RequestDraft | EmbedDraft) -> Operation[str]:
    """Return the model of a draft: the one it names, else the only one that is served; raises as `submit` does."""
    if draft.model is not None and not draft.require_worker:
        return draft.model
    if draft.model is not None:
        raw = yield commands(("GET", keys.capacity(draft.model)))
        if answers(raw)[0] not in (None, "0"):
            return draft.model  # without a look at every worker, of which there may be a thousand
    live = yield from workers(keys)
    served = _served(live)
    if draft.model is None:
        if len(served) == 1:
            return served[0]
        if not served:
            raise RequestError(
                "no model is named and no live worker serves one; start a worker with `lamella worker --model NAME`, "
                "or name the model and submit with require_worker=False to queue the job"
            )
        raise RequestError(f"no model is named and several are served; name one of them: {', '.join(served)}")
    if draft.model not in served:
        ranked = rank(draft.model, live)
        raise NoWorkerError(draft.model, served, ranked[0].advice(draft.model) if ranked else None)
    return draft.model


def status(keys: Keys, job_id: str) -> Operation[JobStatus]:
    """Return a job's status, with its outlook while it has not ended.

    Raises:
        JobNotFound: there is no record of it.
    """
    raw = yield commands(("HMGET", keys.job(check_job_id(job_id)), *STATUS_FIELDS))
    found = decode_status(job_id, answers(answers(raw)[0]))
    if found is None:
        raise JobNotFound(job_id)
    if found.state.is_final:
        return found
    call = outlook_call(keys, job_id)
    return _with_outlook(found, call.decode((yield call)))


def _with_outlook(found: JobStatus, outlook: Outlook) -> JobStatus:
    if outlook.position is None:
        return found
    now = time.time()
    return found.model_copy(
        update={
            "position": outlook.position,
            "estimated_start_at": None if outlook.starts_in_s is None else now + outlook.starts_in_s,
            "estimated_end_at": None if outlook.ends_in_s is None else now + outlook.ends_in_s,
            "estimate": outlook.basis,
        }
    )


def cancel(keys: Keys, job_id: str) -> Operation[CancelStatus]:
    """Cancel a job: at once if it waits, at its next sweep boundary if it runs; a job that has ended stays as it is.

    Raises:
        JobNotFound: there is no record of it.
    """
    call = cancel_call(keys, check_job_id(job_id))
    outcome = call.decode((yield call))
    if outcome is CancelStatus.MISSING:
        raise JobNotFound(job_id)
    return outcome


def retry(keys: Keys, job_id: str) -> Operation[str]:
    """Let a dead job go on as a new one, after its last token, and return the new job's id.

    Raises:
        JobNotFound: there is no record of it.
        RequestError: it is not dead.
        QueueFull: the model's queue is at its bound.
    """
    found = yield from status(keys, job_id)
    new_id = uuid.uuid4().hex
    with submission("lamella.retry", found.model) as trace:
        call = retry_call(keys, job_id, new_id, trace.traceparent)
        reply = call.decode((yield call))
        trace.accepted(reply.job_id, reply.status.value)
    match reply.status:
        case RetryStatus.RETRIED:
            return reply.job_id
        case RetryStatus.MISSING:
            raise JobNotFound(job_id)
        case RetryStatus.FULL:
            raise QueueFull(f"the queue of {found.model!r} is at its bound; nothing was changed. Try again later.", 5.0)
        case RetryStatus.NOT_DEAD | RetryStatus.UNKNOWN_SCHEMA:
            raise RequestError(
                f"job {job_id} is {found.state.value}, and not because its attempts were used up; only such a job can "
                "be retried (`lamella jobs dead` lists them). Submit any other one again."
            )


def dead_jobs(keys: Keys, limit: int) -> Operation[list[JobStatus]]:
    """Return the newest jobs whose attempts were used up, newest first, of those that are listed at all."""
    _check_limit(limit)
    listed = yield from jobs(keys, JOBS_LISTED)
    dead = [job for job in listed if isinstance(job.outcome, Failed) and job.outcome.code == ATTEMPTS_EXHAUSTED]
    return dead[:limit]


def _check_limit(limit: int) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= JOBS_LISTED:
        raise RequestError(f"limit is {limit!r}; use a whole number from 1 to {JOBS_LISTED}")


def jobs(keys: Keys, limit: int) -> Operation[list[JobStatus]]:
    """Return the newest jobs, newest first; those whose record expired or is of another version are left out."""
    _check_limit(limit)
    raw = yield commands(("ZREVRANGE", keys.jobs, 0, limit - 1))
    ids = [str(job_id) for job_id in answers(answers(raw)[0])]
    if not ids:
        return []
    records = yield commands(*(("HMGET", keys.job(job_id), *STATUS_FIELDS) for job_id in ids))
    found = []
    for job_id, values in zip(ids, answers(records), strict=True):
        try:
            job = decode_status(job_id, answers(values))
        except DecodeError as error:
            log.warning("left out of the listing: %s", error)
            continue
        if job is not None:
            found.append(job)
    return found


def workers(keys: Keys) -> Operation[list[WorkerInfo]]:
    """Return the workers whose heartbeat is alive, sorted by name."""
    raw = yield commands(("ZREVRANGE", keys.workers, 0, MAX_WORKERS_LISTED - 1))
    names = sorted(str(name) for name in answers(answers(raw)[0]))
    if not names:
        return []
    heartbeats = yield commands(("MGET", *(keys.worker(name) for name in names)))
    return decode_workers(answers(answers(heartbeats)[0]))


def models(keys: Keys) -> Operation[list[ModelInfo]]:
    """Return the models served by live workers that still take jobs, sorted by name, with the slots of all together."""
    live = yield from workers(keys)
    found: dict[str, ModelInfo] = {}
    for model in (model for worker in live if not worker.draining for model in worker.served):
        before = found.get(model.name)
        together = (
            {"slots": model.slots, "running": model.running}
            if before is None
            else {"slots": before.slots + model.slots, "running": before.running + model.running}
        )
        found[model.name] = model.model_copy(update=together)
    return [found[name] for name in sorted(found)]


def waiting(keys: Keys, names: list[str]) -> Operation[dict[str, int]]:
    """Return how many jobs wait for each of these models."""
    if not names:
        return {}
    raw = yield commands(*(("HMGET", keys.queue(name), "n0", "n1", "n2") for name in names))
    counted = zip(names, answers(raw), strict=True)
    return {name: sum(int(str(count or 0)) for count in answers(counts)) for name, counts in counted}


def check_job_id(job_id: object) -> str:
    """Return `job_id` if it can be one.

    Raises:
        RequestError: it is not text.
        JobNotFound: it is text of a form that no job id has.
    """
    if not isinstance(job_id, str):
        raise RequestError(f"a job id is text (str), not {type(job_id).__name__}; use Job.id of a submitted job")
    if not 1 <= len(job_id) <= 200 or not job_id.isprintable():
        raise JobNotFound(job_id[:60])
    return job_id
