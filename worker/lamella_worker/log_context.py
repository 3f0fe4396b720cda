"""What every line of the log says beside its message: which worker and model, which job and which attempt.

Owns those labels for this process, and how a line is found to be about a job: by the ``job=<id>`` in its message, by
what Celery or the engine attached to it, else by the job that the thread works on. `log_setup` writes them; `session`
and, in the engine process, `engine_server` say what a thread works on.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass

_JOB = re.compile(r"\bjob=([^\s,;:]+)")


@dataclass(frozen=True)
class ProcessLabels:
    """What is the same in all lines of a process, and their form; the engine process is told it by its worker."""

    log_format: str = "text"
    worker: str | None = None
    model: str | None = None

    def encoded(self) -> str:
        """The labels as one word of a command line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def decoded(cls, text: str) -> ProcessLabels:
        """Read what `encoded` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class JobLabel:
    """A job that a line is about; `attempt` is None where this process holds no claim on it."""

    job: str
    attempt: int | None


_current: ContextVar[JobLabel | None] = ContextVar("lamella_job", default=None)
_lock = threading.Lock()
_attempts: dict[str, int] = {}  # of the jobs that are claimed here: as many as there are slots


@contextmanager
def about_job(job_id: str, attempt: int | None = None) -> Iterator[None]:
    """What this thread logs in the block is about the job; with an attempt, so is what others log of it meanwhile."""
    token = _current.set(JobLabel(job_id, attempt))
    if attempt is not None:
        with _lock:
            _attempts[job_id] = attempt
    try:
        yield
    finally:
        _current.reset(token)
        if attempt is not None:
            with _lock:
                _attempts.pop(job_id, None)


def sequence_id(job_id: str, fence: int, attempt: int) -> str:
    """The name of a claimed job's sequence in the engine: each claim's is another one."""
    return f"{job_id}.{fence}.{attempt}"


def job_of(sequence: str) -> JobLabel:
    """The job that a sequence's name tells."""
    parts = sequence.rsplit(".", 2)
    if len(parts) == 3 and parts[2].isdigit():
        return JobLabel(parts[0], int(parts[2]))
    return JobLabel(sequence, None)


def jobs_of(record: logging.LogRecord, message: str) -> list[JobLabel]:
    """The jobs that a line is about."""
    sequences = getattr(record, "sequences", None)  # lamella_engine attaches them to what concerns several
    if sequences:
        return [job_of(str(name)) for name in sequences]
    if found := _JOB.search(message):
        return [_label(found.group(1))]
    data = getattr(record, "data", None)  # celery attaches its task, whose id is the job's
    if isinstance(data, dict) and isinstance(data.get("id"), str):
        return [_label(data["id"])]
    current = _current.get(None)
    return [] if current is None else [_label(current.job, current.attempt)]


def _label(job_id: str, attempt: int | None = None) -> JobLabel:
    current = _current.get(None)
    if attempt is None and current is not None and current.job == job_id:
        attempt = current.attempt
    if attempt is None:
        with _lock:
            attempt = _attempts.get(job_id)
    return JobLabel(job_id, attempt)
