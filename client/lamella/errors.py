"""Every exception the client library raises.

::

    LamellaError
    ├── RequestError              the call itself is unusable; nothing was sent
    │   ├── IdempotencyConflict   the same key was used before with another request
    │   ├── DeadlineHopeless      the job could not be done before its deadline
    │   └── NoWorkerError         no live worker serves the model (``served`` lists what is)
    ├── ServerError               Redis did not do its part; the call may be repeated
    │   ├── ServerUnreachable     no answer from Redis
    │   ├── ServerRefused         Redis answered with a refusal (memory full, access denied, read-only)
    │   └── QueueFull             the model's queue is at its bound (``retry_after_s`` says when to try again)
    │       └── UserLimitReached  one of the user's own limits is reached
    ├── JobError                  the job exists or existed, and did not end in Done
    │   ├── JobNotFound           no such job (wrong id, expired, or the server lost its data)
    │   ├── JobFailed             ended in Failed (``code``, ``message``)
    │   └── JobCancelled          ended in Cancelled
    ├── WaitTimeout               the caller's own deadline passed; the job goes on
    ├── EncryptionError           a job is encrypted, and its key is not here or is another one
    ├── DecodeError               a message on the wire is not of a form this version reads
    └── ConfigError               a setting is unknown or cannot work (file, key and fix are named)
"""

from __future__ import annotations


class LamellaError(Exception):
    """Root of every error raised by the client library."""


class RequestError(LamellaError):
    """The request cannot be sent as it is; the message says what to change."""


class IdempotencyConflict(RequestError):
    """The idempotency key belongs to an earlier job with another request."""


class NoWorkerError(RequestError):
    """No live worker serves the model.

    Attributes:
        model: the model that was asked for.
        served: names of the models that live workers do serve. The message also tells which host could best serve it.
    """

    def __init__(self, model: str, served: tuple[str, ...], advice: str | None = None) -> None:
        self.model = model
        self.served = served
        what = ", ".join(served) if served else "none (no worker is running)"
        start = f"{advice[:1].upper()}{advice[1:]}" if advice else f"Start one with `lamella worker --model {model}`"
        super().__init__(
            f"no live worker serves {model!r}; served now: {what}. {start}, or submit with require_worker=False to "
            "queue the job."
        )


class DeadlineHopeless(RequestError):
    """The deadline would pass before the job could be done, even if all goes twice as fast as estimated.

    Attributes:
        estimate_s: seconds until the job could bring its first token.
        retry_after_s: seconds after which the queue may be shorter.
    """

    def __init__(self, message: str, estimate_s: float, retry_after_s: float) -> None:
        self.estimate_s = estimate_s
        self.retry_after_s = retry_after_s
        super().__init__(message)


class ServerError(LamellaError):
    """Redis did not do its part; nothing was half-done and the call may be repeated."""


class ServerUnreachable(ServerError):
    """Redis did not answer in time."""


class ServerRefused(ServerError):
    """Redis answered with a refusal: memory full, access denied, or read-only."""


class QueueFull(ServerError):
    """The model's queue is at its bound; try again later.

    Attributes:
        retry_after_s: seconds after which a place may be free.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class UserLimitReached(QueueFull):
    """As many jobs or tokens of this user wait and run as may."""


class JobError(LamellaError):
    """The job did not end in Done.

    Attributes:
        job_id: the job.
    """

    def __init__(self, job_id: str, message: str) -> None:
        self.job_id = job_id
        super().__init__(message)


class JobNotFound(JobError):
    """No record of the job: a wrong id, an expired record, or a server that lost its data."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            job_id,
            f"there is no job {job_id!r}: the id is wrong, its record expired, or the server lost its data. "
            "`lamella jobs` lists the jobs that exist.",
        )


class JobFailed(JobError):
    """The job ended in Failed.

    Attributes:
        code: machine-readable reason, such as ``prompt_too_long`` or ``attempts_exhausted``.
        message: what happened, why, and what to do.
    """

    def __init__(self, job_id: str, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(job_id, f"job {job_id} failed ({code}): {message}")


class JobCancelled(JobError):
    """The job ended in Cancelled."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id, f"job {job_id} was cancelled")


class WaitTimeout(LamellaError):
    """The caller's deadline passed; the job itself goes on and can be streamed again."""


class EncryptionError(LamellaError):
    """A job is encrypted and cannot be read here: its key is missing or another one. The job itself is unharmed."""


class DecodeError(LamellaError):
    """A message on the wire is malformed or of a newer schema than this version reads."""


class ConfigError(LamellaError):
    """A setting is unknown or cannot work; the message names the place, the key and the fix."""
