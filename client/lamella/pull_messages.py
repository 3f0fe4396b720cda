"""What crosses Redis when a worker is asked to bring a model into its host's store, and how far it is.

Owns the two messages and their bounds; `pulls` (client) and the worker's `pull_keeper` exchange them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from lamella.errors import DecodeError
from lamella.messages import Wire, check_model_name

MAX_ASKERS = 64
MAX_PULL_CHARS = 20_000
_MAX_TEXT = 8000

AskId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class PullState(StrEnum):
    """Where a pull stands; the last two are final."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """True once nothing more will happen."""
        return self in (PullState.DONE, PullState.FAILED)


class PullRequest(Wire):
    """Asks a worker for a model; `ask_id` is how whoever asked finds the answer, `serve` asks to serve it then."""

    version: Literal[1] = 1
    ask_id: AskId
    model: str
    serve: bool = True

    @field_validator("model")
    @classmethod
    def _model_name(cls, value: str) -> str:
        return check_model_name(value)


class PullStatus(Wire):
    """How far a pull is; `asks` are the requests it answers, the newest ones, since several may ask for one model.

    `phase` is what goes on, `done_bytes` of `total_bytes` of it done; `message` says how it ended or what for
    it waits.
    """

    version: Literal[1] = 1
    asks: tuple[AskId, ...] = Field(max_length=MAX_ASKERS)
    state: PullState
    phase: str = Field(default="", max_length=100)
    done_bytes: int = Field(default=0, ge=0)
    total_bytes: int = Field(default=0, ge=0)
    message: str = Field(default="", max_length=_MAX_TEXT)
    updated_at: float


def decode_pull_request(raw: str) -> PullRequest:
    """Decode a request; raises DecodeError."""
    if len(raw) > MAX_PULL_CHARS:
        raise DecodeError(f"{len(raw)} characters are too many for a pull request")
    try:
        return PullRequest.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise DecodeError(f"not a pull request this version reads: {error.errors()[0]['msg']}") from error


def decode_pull_status(raw: str) -> PullStatus:
    """Decode a status; raises DecodeError."""
    if len(raw) > MAX_PULL_CHARS:
        raise DecodeError(f"{len(raw)} characters are too many for the status of a pull")
    try:
        return PullStatus.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise DecodeError(f"not the status of a pull that this version reads: {error.errors()[0]['msg']}") from error
