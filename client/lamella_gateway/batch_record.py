"""What is known of a batch: what was asked, how far it is, how it ended; one frozen object, replaced as it goes on.

Owns the phases and what status each shows. Neighbours: `batch_store` (keeps it), `batch_execution` (brings it from
phase to phase), `batch_shapes` (shows it).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from lamella.messages import Wire


class Phase(StrEnum):
    """Where a batch stands."""

    CHECK = "check"
    RUN = "run"
    FINISH = "finish"
    ENDED = "ended"


class End(StrEnum):
    """How a batch ends, or is about to."""

    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
_SHOWN: dict[Phase, Status] = {Phase.CHECK: "validating", Phase.RUN: "in_progress", Phase.FINISH: "finalizing"}
_ENDED: dict[End, Status] = {
    End.COMPLETED: "completed",
    End.FAILED: "failed",
    End.EXPIRED: "expired",
    End.CANCELLED: "cancelled",
}


class BatchFault(Wire):
    """Why a batch could not be begun or gone on with; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Tally(Wire):
    """Lines that have a record, by what it says, and the tokens of those answered."""

    completed: int = 0
    failed: int = 0
    given_up: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class BatchRecord(Wire):
    """One batch; times are Unix seconds.

    Attributes:
        owner: whose directory it is in.
        key_id: the API key that pays, None where none is asked for.
        digest: what a repeated request is known by, empty where it cannot be.
        default_tokens: how long an answer may be that does not say.
        contexts: the models of the lines and their contexts in tokens, None where it is not known. With
            `default_tokens` they are kept, so that a line asks for the same job whoever goes on with it.
        keep_s: how long its outputs are kept.
        ends_as: how it will end, as far as it is known.
    """

    version: Literal[1] = 1
    batch_id: str
    owner: str
    key_id: str | None
    digest: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    default_tokens: int
    contexts: dict[str, int | None] = Field(default_factory=dict)
    keep_s: float
    phase: Phase = Phase.CHECK
    ends_as: End = End.COMPLETED
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    cancelling_at: int | None = None
    ended_at: int | None = None
    total: int = 0
    tally: Tally = Tally()
    errors: tuple[BatchFault, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def status(self) -> Status:
        """What is shown of it."""
        if self.phase is Phase.ENDED:
            return _ENDED[self.ends_as]
        return "cancelling" if self.ends_as is End.CANCELLED else _SHOWN[self.phase]

    def changed(self, **changes: object) -> BatchRecord:
        """Return it with some fields changed."""
        return self.model_copy(update=changes)
