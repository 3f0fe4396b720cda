"""What the routes of batches send back; the types are also what ``/openapi.json`` says."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from lamella_gateway.batch_record import BatchRecord, End, Phase, Status
from lamella_gateway.response_shapes import InputDetails, OutputDetails, ResponseUsageBody


class BatchFaultBody(TypedDict):
    """Why a batch failed; `line` counts from 1."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchFaultsBody(TypedDict):
    """Everything that is wrong with a batch, up to a bound."""

    object: Literal["list"]
    data: list[BatchFaultBody]


class CountsBody(TypedDict):
    """Lines of a batch; those that were not run because it ended early are in neither of the last two."""

    total: int
    completed: int
    failed: int


class BatchBody(TypedDict):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchFaultsBody | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: CountsBody
    usage: ResponseUsageBody
    metadata: dict[str, str] | None


class BatchesBody(TypedDict):
    """A page of batches, newest first."""

    object: Literal["list"]
    data: list[BatchBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_body(record: BatchRecord, *, is_cancelling: bool) -> BatchBody:
    """Return a batch as it is shown; `is_cancelling` says that it was asked to end."""
    has_ended = record.phase is Phase.ENDED
    tally = record.tally
    is_marked = is_cancelling and not has_ended and record.ends_as in (End.COMPLETED, End.CANCELLED)
    return BatchBody(
        id=record.batch_id,
        object="batch",
        endpoint=record.endpoint,
        model=next(iter(record.contexts)) if len(record.contexts) == 1 else None,
        errors=_faults(record),
        input_file_id=record.input_file_id,
        completion_window=record.completion_window,
        status="cancelling" if is_marked else record.status,
        output_file_id=record.output_file_id if has_ended else None,
        error_file_id=record.error_file_id if has_ended else None,
        created_at=record.created_at,
        in_progress_at=record.in_progress_at,
        expires_at=record.expires_at,
        finalizing_at=record.finalizing_at,
        completed_at=_ended_at(record, End.COMPLETED),
        failed_at=_ended_at(record, End.FAILED),
        expired_at=_ended_at(record, End.EXPIRED),
        cancelling_at=record.cancelling_at,
        cancelled_at=_ended_at(record, End.CANCELLED),
        request_counts=CountsBody(total=record.total, completed=tally.completed, failed=tally.failed),
        usage=ResponseUsageBody(
            input_tokens=tally.input_tokens,
            input_tokens_details=InputDetails(cached_tokens=0, cache_write_tokens=0),
            output_tokens=tally.output_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=0),
            total_tokens=tally.input_tokens + tally.output_tokens,
        ),
        metadata=record.metadata,
    )


def batches_body(data: list[BatchBody], *, has_more: bool) -> BatchesBody:
    """Return a page of batches."""
    return BatchesBody(
        object="list",
        data=data,
        first_id=data[0]["id"] if data else None,
        last_id=data[-1]["id"] if data else None,
        has_more=has_more,
    )


def _ended_at(record: BatchRecord, end: End) -> int | None:
    return record.ended_at if record.ends_as is end else None


def _faults(record: BatchRecord) -> BatchFaultsBody | None:
    if not record.errors:
        return None
    data = [
        BatchFaultBody(code=fault.code, line=fault.line, message=fault.message, param=fault.param)
        for fault in record.errors
    ]
    return BatchFaultsBody(object="list", data=data)
