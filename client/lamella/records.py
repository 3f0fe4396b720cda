"""Reading what the registry holds: a job's hash, a worker's heartbeat, into the types of `messages`.

Owns the names of the hash fields that readers need; the scripts in ``lua/`` write them. Does no I/O.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pydantic import ValidationError

from lamella.errors import DecodeError
from lamella.messages import (
    MAX_HEARTBEAT_CHARS,
    SCHEMA_VERSION,
    Cancelled,
    Done,
    Failed,
    JobState,
    JobStatus,
    Priority,
    TerminalEvent,
    WorkerInfo,
    decode_event,
)

log = logging.getLogger(__name__)

_SCHEMAS = tuple(str(version) for version in range(1, SCHEMA_VERSION + 1))
STATUS_FIELDS = (
    "v",
    "state",
    "model",
    "attempts",
    "seq",
    "created_at",
    "started_at",
    "finished_at",
    "worker",
    "cancel",
    "outcome",
    "user",
    "class",
    "deadline",
)


def decode_status(job_id: str, values: Sequence[object]) -> JobStatus | None:
    """Turn the values of STATUS_FIELDS into a status; None if there is no record.

    Raises:
        DecodeError: the record is malformed or of another schema.
    """
    record = dict(zip(STATUS_FIELDS, values, strict=True))
    if record["state"] is None:
        return None
    if record["v"] not in _SCHEMAS:
        raise DecodeError(
            f"the record of job {job_id} has schema {record['v']!r}, this version reads {' and '.join(_SCHEMAS)}; "
            "use the lamella version that wrote it"
        )
    try:
        for value in values:
            str(value).encode()  # what is no text fails here
        return JobStatus(
            job_id=job_id,
            state=JobState(str(record["state"])),
            model=str(record["model"]),
            attempts=int(str(record["attempts"])),
            events=int(str(record["seq"])),
            created_at=int(str(record["created_at"])) / 1000,
            started_at=_seconds(record["started_at"]),
            finished_at=_seconds(record["finished_at"]),
            worker=None if record["worker"] is None else str(record["worker"]),
            cancel_requested=record["cancel"] is not None,
            user=None if record["user"] is None else str(record["user"]),
            priority=Priority.of_rank(int(str(record["class"] or Priority.NORMAL.rank))),
            deadline_at=_seconds(record["deadline"]),
            outcome=None if record["outcome"] is None else decode_outcome(str(record["outcome"])),
        )
    except (ValueError, IndexError, OverflowError) as error:
        raise DecodeError(f"the record of job {job_id} is malformed ({str(error).splitlines()[0]})") from error


def decode_outcome(raw: str) -> TerminalEvent:
    """Decode a terminal event.

    Raises:
        DecodeError: it is no event, or not a terminal one.
    """
    event = decode_event(raw)
    if not isinstance(event, Done | Failed | Cancelled):
        raise DecodeError(f"a job's outcome is a {event.type} event; only done, failed or cancelled ends a job")
    return event


def decode_workers(values: Sequence[object]) -> list[WorkerInfo]:
    """Turn heartbeats into worker descriptions; those of vanished workers (None) and of other versions are left out."""
    workers = []
    for value in values:
        if value is None:
            continue
        if len(str(value)) > MAX_HEARTBEAT_CHARS:
            log.warning("left out a worker whose heartbeat has %d characters", len(str(value)))
            continue
        try:
            workers.append(WorkerInfo.model_validate_json(str(value), strict=True))
        except ValidationError as error:
            log.warning("left out a worker whose heartbeat this version does not read: %s", error.errors()[0]["msg"])
    return workers


def _seconds(milliseconds: object) -> float | None:
    return None if milliseconds is None else int(str(milliseconds)) / 1000
