"""Every error of the gateway as OpenAI's envelope, and what the client library raises as such an error.

Owns the mapping from `lamella.errors` to HTTP. Neighbours: `app` and `live_response` (which send them).
"""

from __future__ import annotations

import json
import math

from lamella.errors import (
    DeadlineHopeless,
    EncryptionError,
    IdempotencyConflict,
    JobCancelled,
    JobFailed,
    JobNotFound,
    LamellaError,
    NoWorkerError,
    QueueFull,
    RequestError,
    ServerError,
    UserLimitReached,
    WaitTimeout,
)

INVALID = "invalid_request_error"
SERVER = "server_error"
LIMITED = "rate_limit_error"
RETRY_SERVER_S = 5.0
LONG_RETRY_S = 120.0  # a client that waits longer than this by itself has hung, for its user

# Failures of jobs that are about what was asked for: HTTP 400 with the field that has to change.
_ASKED_WRONG = {
    "prompt_empty": "messages",
    "prompt_too_long": "messages",
    "bad_token": "stop_token_ids",
    "no_chat_template": "messages",
    "bad_request": None,
    "bad_response_format": "response_format",
    "response_format_unsupported": "response_format",
    "tools_unsupported": "tools",
    "embeddings_unsupported": "model",
    "too_many_texts": "input",
    "wrong_model": "model",
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: the HTTP status.
        message: what happened, why, what to do.
        type: OpenAI's kind of error.
        param: the field that is wrong, None if none is.
        code: for programs.
        retry_after_s: when to try again, None where that does not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """Return the envelope as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        headers = {"content-type": "application/json"}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
            if self.retry_after_s > LONG_RETRY_S:
                headers["x-should-retry"] = "false"
        return headers


def unknown_model(model: str) -> ApiError:
    """Return the error for a model that nobody serves or ever served."""
    return ApiError(
        404,
        f"there is no model {model[:200]!r} here; GET /v1/models lists those that are served",
        param="model",
        code="model_not_found",
    )


def model_away(model: str) -> ApiError:
    """Return the error for a model that has no live worker now."""
    return ApiError(
        503,
        f"no worker serves {model!r} now; try again later, or start one with `lamella worker --model {model}`",
        type=SERVER,
        param="model",
        code="model_unavailable",
        retry_after_s=RETRY_SERVER_S,
    )


def from_lamella(error: LamellaError) -> ApiError:
    """Return the answer for what the client library raised."""
    said = str(error)
    match error:
        case RequestError() | QueueFull():
            return _not_accepted(error)
        case ServerError() | EncryptionError():
            return _unavailable(error)
        case JobFailed(code=code, message=message):
            return job_failure(code, message)
        case JobCancelled():
            return ApiError(409, said, code="cancelled")
        case JobNotFound():
            return ApiError(404, said, code="not_found")
        case WaitTimeout():
            return ApiError(504, said, type=SERVER, code="timeout")
    return ApiError(500, said, type=SERVER, code="job_unreadable")


def _not_accepted(error: RequestError | QueueFull) -> ApiError:
    """Return the answer for a job that was not submitted."""
    said = str(error)
    match error:
        case NoWorkerError(model=model):
            return model_away(model)
        case IdempotencyConflict():
            return ApiError(422, said, type="idempotency_error", param="Idempotency-Key", code="idempotency_conflict")
        case DeadlineHopeless(retry_after_s=retry_s):
            return ApiError(429, said, type=LIMITED, code="deadline_hopeless", retry_after_s=retry_s)
        case QueueFull(retry_after_s=retry_s):
            code = "user_limit_reached" if isinstance(error, UserLimitReached) else "queue_full"
            return ApiError(429, said, type=LIMITED, code=code, retry_after_s=retry_s)
    return ApiError(400, said, code="invalid_value")


def job_failure(code: str, message: str) -> ApiError:
    """Return the answer for a job that ended in Failed."""
    if code in _ASKED_WRONG:
        shown = "context_length_exceeded" if code == "prompt_too_long" else code
        return ApiError(400, message, param=_ASKED_WRONG[code], code=shown)
    return ApiError(500 if code != "deadline" else 504, message, type=SERVER, code=code)


def _unavailable(error: LamellaError) -> ApiError:
    code = "encryption" if isinstance(error, EncryptionError) else "queue_unavailable"
    # The library's words name the server's address, which is the operator's business and not the caller's.
    what = (
        "this model's workers cannot read what this gateway encrypts" if code == "encryption" else "the queue is away"
    )
    return ApiError(503, f"{what}; nothing was lost, try again", type=SERVER, code=code, retry_after_s=RETRY_SERVER_S)
