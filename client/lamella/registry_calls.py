"""The job registry's scripts as values: what to send (script, keys, arguments) and how to read the answer.

Owns the argument order and the replies of ``lua/*.lua``; does no I/O, so that the synchronous client, the asyncio
client and the worker all speak to the registry through the same functions. Neighbours: `keys` (names and times to
live), `messages` (events and requests), `connection` and the worker's registry (which send the calls).

Connections must use ``protocol=2``; text and bytes replies are both read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import NamedTuple

from lamella import keys as wire_keys
from lamella.embedding import EmbeddingsEvent, EmbedRequest
from lamella.keys import Keys
from lamella.messages import (
    SCHEMA_VERSION,
    Cancelled,
    Done,
    Failed,
    GenerateRequest,
    JobEvent,
    JobState,
    TokenEvent,
)
from lamella.queue_terms import QueueTerms, expected_cost
from lamella.script_call import (
    ScriptCall,
    ScriptName,
    read_integer,
    read_items,
    read_member,
    read_text,
    script_call,
)

ATTEMPTS_EXHAUSTED = "attempts_exhausted"  # the code of a dead job's failure
DEADLINE = "deadline"  # the code of a job whose deadline passed; `_end.lua` writes it as well


class SubmitStatus(StrEnum):
    """What became of a submit."""

    CREATED = "created"
    EXISTS = "exists"  # the idempotency key holds this very request; its job is returned
    CONFLICT = "conflict"  # the idempotency key holds another request
    FULL = "full"  # as many jobs of the model wait as may
    USER_FULL = "user_full"  # the same for this user's
    USER_TOKENS = "user_tokens"  # the user's jobs, this one included, are estimated at more tokens than may be
    HOPELESS = "hopeless"  # its deadline is sure to pass before it is done
    UNSERVED = "unserved"  # no live worker has slots for the model, which was asked for
    DUPLICATE = "duplicate"  # this job id is already there: an earlier try of the same submit was accepted


class SubmitReply(NamedTuple):
    """Answer to a submit.

    `queued` counts the jobs that wait for the model, this one included; where a limit of the user's refused it, the
    user's jobs (USER_FULL) or tokens (USER_TOKENS). `limit` is that limit; `retry_after_s` when to try again;
    `estimate_s` (HOPELESS) how long until the job could be done.
    """

    status: SubmitStatus
    job_id: str
    queued: int
    limit: int = 0
    retry_after_s: float = 0.0
    estimate_s: float = 0.0


class ClaimStatus(StrEnum):
    """Whether a worker may run the job, or why not."""

    OK = "ok"
    MISSING = "missing"
    HELD = "held"  # a live worker has it
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    POISON = "poison"  # out of attempts; the call has just ended it in Failed
    UNKNOWN_SCHEMA = "unknown_schema"


class ClaimReply(NamedTuple):
    """Answer to a claim; all but `status` mean something only when it is OK.

    `seq` is the highest stored event, so the next one is ``seq + 1``. `request_json` is left encoded because the claim
    already stands when it turns out unreadable: decode with `decode_request`, end the job under `fence` if it raises.
    `was_left` says that the worker which had it before never gave it back: its lease ran out.
    """

    status: ClaimStatus
    fence: int = 0
    attempts: int = 0
    seq: int = 0
    request_json: str = ""
    was_left: bool = False


class EmitStatus(StrEnum):
    """Whether events were stored."""

    OK = "ok"
    FENCED = "fenced"  # the claim is void: another worker has the job, or it has ended
    MISSING = "missing"  # no record: the server lost its data or the record expired
    GAP = "gap"  # the events before first_seq are not stored


class EmitReply(NamedTuple):
    """Answer to an emit; either flag asks the worker to stop the job at the next sweep boundary."""

    status: EmitStatus
    cancel_requested: bool
    is_overdue: bool = False


class ReleaseStatus(StrEnum):
    """Whether the job went back to the queue's truth."""

    OK = "ok"
    FENCED = "fenced"
    MISSING = "missing"


class NudgeStatus(StrEnum):
    """What the reconciler's look at a job came to."""

    NUDGED = "nudged"  # its Celery message was sent again
    WAITING = "waiting"
    HELD = "held"
    GONE = "gone"


class CancelStatus(StrEnum):
    """What became of a cancel; DONE and FAILED: the job had ended before."""

    CANCELLED = "cancelled"
    REQUESTED = "requested"  # running; its worker cancels at the next sweep boundary
    MISSING = "missing"
    DONE = "done"
    FAILED = "failed"


class RetryStatus(StrEnum):
    """What became of a retry."""

    RETRIED = "retried"
    NOT_DEAD = "not_dead"  # it has attempts left, or ended otherwise
    MISSING = "missing"
    UNKNOWN_SCHEMA = "unknown_schema"
    FULL = "full"


class RetryReply(NamedTuple):
    """Answer to a retry; `job_id` is the job that goes on, which an earlier retry may have made."""

    status: RetryStatus
    job_id: str


class Idempotency(NamedTuple):
    """An idempotency key and the hash of the request it stands for."""

    key: str
    request_hash: str


def submit_call(
    keys: Keys,
    job_id: str,
    request: GenerateRequest | EmbedRequest,
    terms: QueueTerms | None = None,
    idempotency: Idempotency | None = None,
    stored_request: str | None = None,
    trace: str | None = None,
) -> ScriptCall[SubmitReply]:
    """Accept a job, to wait on these terms (None: the anonymous user's, with normal priority and no deadline).

    `stored_request` is the request if that is in a box; `trace` is the W3C traceparent of whoever asks for it, which
    travels in the headers of its Celery message.
    """
    terms = terms or QueueTerms()
    cost = expected_cost(request)
    return script_call(
        ScriptName.SUBMIT,
        keys,
        (keys.job(job_id), keys.idempotency(idempotency.key) if idempotency else keys.job(job_id)),
        (
            job_id,
            request.needs_schema,
            request.model,
            request.model_dump_json(exclude_none=True) if stored_request is None else stored_request,
            wire_keys.MAX_QUEUED,
            wire_keys.JOBS_LISTED,
            keys.idempotency_ttl_s,
            idempotency.request_hash if idempotency else "",
            terms.user,
            terms.priority.rank,
            cost.prompt,
            cost.answer,
            0 if terms.deadline_s is None else max(1, int(terms.deadline_s * 1000)),
            cost.least_answer,
            trace or "",
        ),
        _decode_submit,
    )


def served_only(call: ScriptCall[SubmitReply]) -> ScriptCall[SubmitReply]:
    """The same submit, refused as UNSERVED where no live worker serves the model."""
    return replace(call, args=(*call.args, 1))


def claim_call(keys: Keys, job_id: str, worker: str, lease_ms: int, max_attempts: int) -> ScriptCall[ClaimReply]:
    """Take a job for `worker`; a job already claimed `max_attempts` times is ended in Failed instead."""
    poison = encode_event(poison_event(job_id, max_attempts))
    args = (job_id, worker, lease_ms, max_attempts, SCHEMA_VERSION, poison)
    return script_call(ScriptName.CLAIM, keys, (keys.job(job_id),), args, _decode_claim)


def emit_call(
    keys: Keys,
    job_id: str,
    fence: int,
    first_seq: int,
    lease_ms: int,
    events: Sequence[JobEvent] = (),
    encode: Callable[[int, JobEvent], str] = lambda seq, event: encode_event(event),
) -> ScriptCall[EmitReply]:
    """Store and publish a job's next events and renew its lease; with no events it only renews (`first_seq` unused).

    `first_seq` is the number of ``events[0]``. A terminal event, which can only be the last one, ends the job in the
    same step. Repeating a call whose answer was lost is harmless. `encode` makes an event's stored text.

    Raises:
        ValueError: a terminal event stands before the last place.
    """
    if any(isinstance(event, Done | Failed | Cancelled) for event in events[:-1]):
        raise ValueError("a terminal event must be the last one of its job")
    final_state = _final_state(events[-1]) if events else ""
    names = (keys.job(job_id), keys.stream(job_id))
    tokens = sum(len(event.token_ids) for event in events if isinstance(event, TokenEvent))
    texts = tuple(encode(first_seq + place, event) for place, event in enumerate(events))
    if final_state:
        args = (job_id, fence, first_seq, final_state, tokens, _tokens_used(events[-1]), *texts)
        return script_call(ScriptName.END, keys, names, args, _decode_emit)
    return script_call(
        ScriptName.EMIT, keys, names, (job_id, fence, first_seq, lease_ms, tokens, len(texts), *texts), _decode_emit
    )


def release_call(
    keys: Keys, job_id: str, fence: int, give_back_attempt: bool, is_aside: bool = False
) -> ScriptCall[ReleaseStatus]:
    """Give a claimed job back; its tokens stay. A graceful drain gives the attempt back as well.

    With `is_aside` it is not offered again at once, because this worker cannot read it.
    """
    args = (job_id, fence, int(give_back_attempt), int(is_aside))
    return script_call(ScriptName.RELEASE, keys, (keys.job(job_id),), args, _decode_release)


def nudge_call(keys: Keys, job_id: str, model: str, quiet_ms: int) -> ScriptCall[NudgeStatus]:
    """Send a job's Celery message again if it looks lost; `quiet_ms` is the least time between two nudges."""
    return script_call(ScriptName.NUDGE, keys, (keys.job(job_id),), (job_id, model, quiet_ms), _decode_nudge)


def cancel_call(keys: Keys, job_id: str) -> ScriptCall[CancelStatus]:
    """Cancel a job at once if no live worker holds it, else ask its worker to."""
    return script_call(ScriptName.CANCEL, keys, (keys.job(job_id),), (job_id,), _decode_cancel)


def retry_call(keys: Keys, job_id: str, new_id: str, trace: str | None = None) -> ScriptCall[RetryReply]:
    """Let a dead job go on as the job `new_id`, after its last token; `trace` as for a submit."""
    names = (keys.job(job_id), keys.stream(job_id), keys.job(new_id), keys.stream(new_id))
    args = (new_id, SCHEMA_VERSION, wire_keys.MAX_QUEUED, wire_keys.JOBS_LISTED, ATTEMPTS_EXHAUSTED, trace or "")
    return script_call(ScriptName.RETRY, keys, names, args, _decode_retry)


def encode_event(event: JobEvent) -> str:
    """Return the event as the JSON text that is stored and published."""
    return event.model_dump_json(exclude_none=True)


def poison_event(job_id: str, max_attempts: int) -> Failed:
    """Return the event that ends a job whose every attempt was lost."""
    return Failed(
        code=ATTEMPTS_EXHAUSTED,
        message=(
            f"the job was started {max_attempts} times and each time its worker died or gave up before the end, so it "
            f"is not started again. Look for job={job_id} in the workers' logs; if they ran out of memory, submit it "
            "again with a shorter prompt or a smaller max_tokens. `lamella jobs retry` goes on with it where it was."
        ),
    )


def deadline_event() -> Failed:
    """Return the event that ends a running job whose deadline passed."""
    return Failed(
        code=DEADLINE,
        message=(
            "the job's deadline passed before it ended; the text up to there is kept. Submit it again with a longer "
            "deadline_s, a smaller max_tokens or a higher priority, or when fewer jobs wait."
        ),
    )


def _tokens_used(event: JobEvent) -> int | str:
    return event.usage.prompt_tokens + event.usage.completion_tokens if isinstance(event, Done) else ""


def _final_state(event: JobEvent) -> str:
    match event:
        case TokenEvent() | EmbeddingsEvent():
            return ""
        case Done():
            return JobState.DONE.value
        case Failed():
            return JobState.FAILED.value
        case Cancelled():
            return JobState.CANCELLED.value


def _decode_submit(raw: object) -> SubmitReply:
    status, job_id, *figures = read_items(raw, "submit", 6)
    queued, limit, retry_ms, estimate_ms = map(read_integer, figures)
    return SubmitReply(
        read_member(SubmitStatus, status), read_text(job_id), queued, limit, retry_ms / 1000, estimate_ms / 1000
    )


def _decode_claim(raw: object) -> ClaimReply:
    items = read_items(raw, "claim", 1)
    status = read_member(ClaimStatus, items[0])
    if status is not ClaimStatus.OK:
        return ClaimReply(status)
    _, *figures, request_json, was_left = read_items(raw, "claim", 6)
    fence, attempts, seq = map(read_integer, figures)
    return ClaimReply(status, fence, attempts, seq, read_text(request_json), read_integer(was_left) == 1)


_EMITTED = EmitReply(EmitStatus.OK, False)


def _decode_emit(raw: object) -> EmitReply:
    if raw == ["ok", 0]:  # of each token
        return _EMITTED
    status, stop = read_items(raw, "emit", 2)
    return EmitReply(read_member(EmitStatus, status), read_integer(stop) == 1, read_integer(stop) == 2)


def _decode_release(raw: object) -> ReleaseStatus:
    return read_member(ReleaseStatus, raw)


def _decode_nudge(raw: object) -> NudgeStatus:
    return read_member(NudgeStatus, raw)


def _decode_cancel(raw: object) -> CancelStatus:
    return read_member(CancelStatus, raw)


def _decode_retry(raw: object) -> RetryReply:
    status, job_id, _ = read_items(raw, "retry", 3)
    return RetryReply(read_member(RetryStatus, status), read_text(job_id))
