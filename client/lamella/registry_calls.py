"""The job registry's scripts as values: what to send (script, keys, arguments) and how to read the answer.

Owns the argument order and the replies of ``lua/*.lua``; does no I/O, so that the synchronous client, the asyncio
client and the worker all speak to the registry through the same functions. Neighbours: `keys` (names and times to
live), `messages` (events and requests), `connection` and the worker's registry (which send the calls).

Connections must use ``protocol=2``; text and bytes replies are both read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Generic, NamedTuple, TypeVar

from lamella import keys as wire_keys
from lamella.errors import DecodeError
from lamella.keys import Keys
from lamella.messages import (
    SCHEMA_VERSION,
    Cancelled,
    Done,
    Failed,
    GenerateRequest,
    JobState,
    TerminalEvent,
    TokenEvent,
)

ATTEMPTS_EXHAUSTED = "attempts_exhausted"  # the code of a dead job's failure

Reply_co = TypeVar("Reply_co", covariant=True)


class ScriptName(StrEnum):
    """The scripts, named after their files in ``lua/``."""

    SUBMIT = "submit"
    CLAIM = "claim"
    EMIT = "emit"
    RELEASE = "release"
    NUDGE = "nudge"
    CANCEL = "cancel"
    RETRY = "retry"


@dataclass(frozen=True)
class ScriptCall(Generic[Reply_co]):
    """One call of a script, ready for EVALSHA.

    Attributes:
        script: which script.
        keys: its KEYS, in order.
        args: its ARGV, in order.
        decode: turns Redis's answer into the call's reply type; raises DecodeError.
    """

    script: ScriptName
    keys: tuple[str, ...]
    args: tuple[str | int, ...]
    decode: Callable[[object], Reply_co]


class SubmitStatus(StrEnum):
    """What became of a submit."""

    CREATED = "created"
    EXISTS = "exists"  # the idempotency key holds this very request; its job is returned
    CONFLICT = "conflict"  # the idempotency key holds another request
    FULL = "full"
    DUPLICATE = "duplicate"  # this job id is already there: an earlier try of the same submit was accepted


class SubmitReply(NamedTuple):
    """Answer to a submit; `queued` counts the messages in the model's queue, this one included."""

    status: SubmitStatus
    job_id: str
    queued: int


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
    """

    status: ClaimStatus
    fence: int = 0
    attempts: int = 0
    seq: int = 0
    request_json: str = ""


class EmitStatus(StrEnum):
    """Whether events were stored."""

    OK = "ok"
    FENCED = "fenced"  # the claim is void: another worker has the job, or it has ended
    MISSING = "missing"  # no record: the server lost its data or the record expired
    GAP = "gap"  # the events before first_seq are not stored


class EmitReply(NamedTuple):
    """Answer to an emit; `cancel_requested` asks the worker to cancel the job at the next sweep boundary."""

    status: EmitStatus
    cancel_requested: bool


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


@cache
def script_source(name: ScriptName) -> str:
    """Return the Lua text of a script."""
    return resources.files("lamella").joinpath("lua", f"{name.value}.lua").read_text(encoding="utf-8")


def submit_call(
    keys: Keys,
    job_id: str,
    request: GenerateRequest,
    message: str,
    idempotency: Idempotency | None = None,
    stored_request: str | None = None,
) -> ScriptCall[SubmitReply]:
    """Accept a job; `message` is its Celery envelope (JSON), `stored_request` its request if that is in a box."""
    unused = keys.job(job_id)
    return ScriptCall(
        ScriptName.SUBMIT,
        (
            keys.job(job_id),
            keys.active,
            keys.jobs,
            keys.queue_list(request.model),
            keys.idempotency(idempotency.key) if idempotency else unused,
        ),
        (
            job_id,
            SCHEMA_VERSION,
            request.model,
            request.model_dump_json(exclude_none=True) if stored_request is None else stored_request,
            message,
            wire_keys.MAX_QUEUED,
            wire_keys.JOBS_LISTED,
            keys.idempotency_ttl_s,
            idempotency.request_hash if idempotency else "",
        ),
        _decode_submit,
    )


def claim_call(keys: Keys, job_id: str, worker: str, lease_ms: int, max_attempts: int) -> ScriptCall[ClaimReply]:
    """Take a job for `worker`; a job already claimed `max_attempts` times is ended in Failed instead."""
    return ScriptCall(
        ScriptName.CLAIM,
        (keys.job(job_id), keys.stream(job_id), keys.active),
        (
            job_id,
            worker,
            lease_ms,
            max_attempts,
            SCHEMA_VERSION,
            keys.channel(job_id),
            keys.finished_ttl_s,
            encode_event(poison_event(job_id, max_attempts)),
            encode_event(Cancelled()),
        ),
        _decode_claim,
    )


def emit_call(
    keys: Keys,
    job_id: str,
    fence: int,
    first_seq: int,
    lease_ms: int,
    events: Sequence[TokenEvent | TerminalEvent] = (),
    encode: Callable[[int, TokenEvent | TerminalEvent], str] = lambda seq, event: encode_event(event),
) -> ScriptCall[EmitReply]:
    """Store and publish a job's next events and renew its lease; with no events it only renews (`first_seq` unused).

    `first_seq` is the number of ``events[0]``. A terminal event, which can only be the last one, ends the job in the
    same step. Repeating a call whose answer was lost is harmless. `encode` makes an event's stored text.

    Raises:
        ValueError: a terminal event stands before the last place.
    """
    if any(not isinstance(event, TokenEvent) for event in events[:-1]):
        raise ValueError("a terminal event must be the last one of its job")
    return ScriptCall(
        ScriptName.EMIT,
        (keys.job(job_id), keys.stream(job_id), keys.active),
        (
            job_id,
            fence,
            first_seq,
            lease_ms,
            keys.channel(job_id),
            keys.finished_ttl_s,
            _final_state(events[-1]) if events else "",
            *(encode(first_seq + place, event) for place, event in enumerate(events)),
        ),
        _decode_emit,
    )


def release_call(keys: Keys, job_id: str, fence: int, give_back_attempt: bool) -> ScriptCall[ReleaseStatus]:
    """Give a claimed job back; its tokens stay. A graceful drain gives the attempt back as well."""
    return ScriptCall(ScriptName.RELEASE, (keys.job(job_id),), (fence, int(give_back_attempt)), _decode_release)


def nudge_call(keys: Keys, job_id: str, model: str, quiet_ms: int) -> ScriptCall[NudgeStatus]:
    """Send a job's Celery message again if it looks lost; `quiet_ms` is the least time between two nudges."""
    names = (keys.job(job_id), keys.queue_list(model), keys.active)
    return ScriptCall(ScriptName.NUDGE, names, (job_id, quiet_ms), _decode_nudge)


def cancel_call(keys: Keys, job_id: str) -> ScriptCall[CancelStatus]:
    """Cancel a job at once if no live worker holds it, else ask its worker to."""
    return ScriptCall(
        ScriptName.CANCEL,
        (keys.job(job_id), keys.stream(job_id), keys.active),
        (job_id, keys.channel(job_id), keys.finished_ttl_s, encode_event(Cancelled())),
        _decode_cancel,
    )


def retry_call(keys: Keys, job_id: str, new_id: str, model: str, message: str) -> ScriptCall[RetryReply]:
    """Let a dead job go on as the job `new_id`, after its last token; `message` is that one's Celery envelope."""
    names = (keys.job(job_id), keys.stream(job_id), keys.job(new_id), keys.stream(new_id))
    bounds = (wire_keys.MAX_QUEUED, wire_keys.JOBS_LISTED)
    return ScriptCall(
        ScriptName.RETRY,
        (*names, keys.active, keys.jobs, keys.queue_list(model)),
        (new_id, message, SCHEMA_VERSION, *bounds, ATTEMPTS_EXHAUSTED),
        _decode_retry,
    )


def encode_event(event: TokenEvent | TerminalEvent) -> str:
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


def _final_state(event: TokenEvent | TerminalEvent) -> str:
    match event:
        case TokenEvent():
            return ""
        case Done():
            return JobState.DONE.value
        case Failed():
            return JobState.FAILED.value
        case Cancelled():
            return JobState.CANCELLED.value


def _decode_submit(raw: object) -> SubmitReply:
    status, job_id, queued = _items(raw, "submit", 3)
    return SubmitReply(_member(SubmitStatus, status), _text(job_id), _integer(queued))


def _decode_claim(raw: object) -> ClaimReply:
    items = _items(raw, "claim", 1)
    status = _member(ClaimStatus, items[0])
    if status is not ClaimStatus.OK:
        return ClaimReply(status)
    _, fence, attempts, seq, request_json = _items(raw, "claim", 5)
    return ClaimReply(status, _integer(fence), _integer(attempts), _integer(seq), _text(request_json))


def _decode_emit(raw: object) -> EmitReply:
    status, cancel = _items(raw, "emit", 2)
    return EmitReply(_member(EmitStatus, status), bool(_integer(cancel)))


def _decode_release(raw: object) -> ReleaseStatus:
    return _member(ReleaseStatus, raw)


def _decode_nudge(raw: object) -> NudgeStatus:
    return _member(NudgeStatus, raw)


def _decode_cancel(raw: object) -> CancelStatus:
    return _member(CancelStatus, raw)


def _decode_retry(raw: object) -> RetryReply:
    status, job_id, _ = _items(raw, "retry", 3)
    return RetryReply(_member(RetryStatus, status), _text(job_id))


Member = TypeVar("Member", bound=StrEnum)


def _member(kind: type[Member], raw: object) -> Member:
    try:
        return kind(_text(raw))
    except ValueError as error:
        raise DecodeError(f"a script answered {raw!r}, which is no {kind.__name__} this version knows") from error


def _items(raw: object, script: str, count: int) -> list[object]:
    if not isinstance(raw, list) or len(raw) < count:
        raise DecodeError(f"the {script} script answered with {type(raw).__name__}, which this version does not read")
    return raw[:count]


def _text(raw: object) -> str:
    if isinstance(raw, bytes):
        return raw.decode()
    if isinstance(raw, str):
        return raw
    raise DecodeError(f"a script answered {raw!r} where text belongs")


def _integer(raw: object) -> int:
    if isinstance(raw, int):
        return raw
    raise DecodeError(f"a script answered {raw!r} where a whole number belongs")
