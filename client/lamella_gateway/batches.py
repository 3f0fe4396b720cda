"""``/v1/batches``: files of requests, answered in time; made, followed, listed and cancelled, each key its own."""

from __future__ import annotations

import hashlib
import time

from starlette.requests import Request
from starlette.responses import JSONResponse

from lamella.batch_lines import BatchUrl
from lamella_gateway import desk as desks
from lamella_gateway import service as services
from lamella_gateway.access import Caller, identify
from lamella_gateway.api_error import LIMITED, ApiError
from lamella_gateway.api_keys import Endpoint
from lamella_gateway.batch_record import BatchRecord, Phase
from lamella_gateway.batch_request import BatchRequest
from lamella_gateway.batch_shapes import BatchBody, batch_body, batches_body
from lamella_gateway.batch_store import BATCH, InputGone
from lamella_gateway.body import parse, read_body
from lamella_gateway.desk import Desk
from lamella_gateway.files import not_found as file_not_found
from lamella_gateway.line_form import ENDPOINTS
from lamella_gateway.owned_place import Page, new_id, on_disk, owner_of
from lamella_gateway.page_query import page_query
from lamella_gateway.repeats import NO_REPEAT, Repeat, recognise

MOST_LISTED, DEFAULT_LISTED = 100, 20
MOST_ACTIVE = 100  # batches of one key that have not ended
REPEATED = 200  # of the newest batches, among which a repeated request finds its first time
RETRY_WITHIN_S = 600  # an SDK that repeats a request by itself does so within a short time


async def create_batch(request: Request) -> JSONResponse:
    """Begin a batch."""
    service = services.of(request)
    caller = await identify(request, Endpoint.BATCHES)
    body = await read_body(request)
    asked = parse(BatchRequest, body)
    _check_endpoint(caller, asked)
    repeat = recognise(request, service, caller, body)
    desk = desks.of(request)
    record = await on_disk(_create, desk, caller, asked, repeat, service.settings.default_max_tokens)
    desk.keeper.wake()
    return JSONResponse(await on_disk(_shown, desk, record))


async def list_batches(request: Request) -> JSONResponse:
    """List batches, newest first."""
    desk = desks.of(request)
    caller = await identify(request, Endpoint.BATCHES)
    page = page_query(request, BATCH, MOST_LISTED, DEFAULT_LISTED)
    found, has_more = await on_disk(desk.batches.page, owner_of(caller.key), page)
    data = [await on_disk(_shown, desk, record) for record in found]
    return JSONResponse(batches_body(data, has_more=has_more))


async def retrieve_batch(request: Request) -> JSONResponse:
    """Tell about a batch."""
    desk, record = await _found(request)
    return JSONResponse(await on_disk(_shown, desk, record))


async def cancel_batch(request: Request) -> JSONResponse:
    """Cancel a batch: what runs is finished, the rest is not begun; one that has ended cannot be cancelled."""
    desk, record = await _found(request)
    if record.phase is Phase.ENDED:
        raise ApiError(
            409,
            f"the batch is {record.status}; only one that has not ended can be cancelled",
            param="batch_id",
            code="batch_ended",
        )
    await on_disk(desk.batches.cancel, record.owner, record.batch_id)
    desk.keeper.wake()
    return JSONResponse(await on_disk(_shown, desk, record))


async def _found(request: Request) -> tuple[Desk, BatchRecord]:
    desk = desks.of(request)
    caller = await identify(request, Endpoint.BATCHES)
    given = request.path_params["batch_id"]
    record = await on_disk(desk.batches.read, owner_of(caller.key), given)
    if record is None:
        raise ApiError(
            404,
            f"there is no batch {given[:80]!r}: the id is wrong, it ended long ago, or it belongs to another API key; "
            "GET /v1/batches lists those there are",
            param="batch_id",
            code="batch_not_found",
        )
    return desk, record


def _shown(desk: Desk, record: BatchRecord) -> BatchBody:
    return batch_body(record, is_cancelling=desk.batches.is_cancelled(record.owner, record.batch_id))


def _check_endpoint(caller: Caller, asked: BatchRequest) -> None:
    endpoint = ENDPOINTS[BatchUrl(asked.endpoint)]
    if caller.key is not None and not caller.key.allows(endpoint):
        raise ApiError(
            403,
            f"this API key may not call {endpoint.value}; make one that may with `lamella keys create`",
            type="permission_error",
            param="endpoint",
            code="endpoint_not_allowed",
        )


def _create(desk: Desk, caller: Caller, asked: BatchRequest, repeat: Repeat, default_tokens: int) -> BatchRecord:
    owner = owner_of(caller.key)
    digest = _digest(repeat, asked)
    before = _before(desk, owner, repeat, digest)
    if before is not None:
        return before
    file = desk.files.read(owner, asked.input_file_id)
    if file is None:
        raise file_not_found(asked.input_file_id, "input_file_id")
    if file.purpose != "batch":
        raise ApiError(
            400,
            f"the file {file.file_id} has the purpose {file.purpose}; upload an input with the purpose batch",
            param="input_file_id",
            code="invalid_value",
        )
    _check_room(desk, owner)
    now = int(time.time())
    record = BatchRecord(
        batch_id=new_id(BATCH),
        owner=owner,
        key_id=None if caller.key is None else caller.key.key_id,
        digest=digest,
        endpoint=asked.endpoint,
        input_file_id=file.file_id,
        completion_window=asked.completion_window,
        metadata=asked.metadata,
        default_tokens=default_tokens,
        keep_s=asked.keep_s,
        created_at=now,
        expires_at=now + asked.window_s,
    )
    try:
        desk.batches.create(record, desk.files.data(owner, file.file_id))
    except InputGone as error:
        raise file_not_found(asked.input_file_id, "input_file_id") from error
    return record


def _check_room(desk: Desk, owner: str) -> None:
    desk.files.check_room(owner, 0)
    active = sum(each == owner for each, _ in desk.batches.active())
    if active >= MOST_ACTIVE:
        raise ApiError(
            429,
            f"{active} batches of this API key have not ended, and no more may be at once; wait for one, or cancel one",
            type=LIMITED,
            code="too_many_batches",
            retry_after_s=60.0,
        )


def _digest(repeat: Repeat, asked: BatchRequest) -> str:
    """Return what a request is known by when it is sent again; a key's is followed by what was asked with it."""
    if repeat.key is None:
        return repeat.digest
    return f"{repeat.key} {hashlib.sha256(asked.model_dump_json().encode()).hexdigest()}"


def _before(desk: Desk, owner: str, repeat: Repeat, digest: str) -> BatchRecord | None:
    """Return the batch that the same request made before."""
    if repeat == NO_REPEAT or (repeat.key is None and not repeat.is_retry):
        return None
    found, _ = desk.batches.page(owner, Page(REPEATED))
    for record in found:
        if repeat.key is not None and record.digest.partition(" ")[0] == repeat.key:
            if record.digest == digest:
                return record
            raise ApiError(
                422,
                "this Idempotency-Key made another batch; use a new one for a new request",
                type="idempotency_error",
                param="Idempotency-Key",
                code="idempotency_conflict",
            )
        if record.digest == digest and time.time() - record.created_at < RETRY_WITHIN_S:
            return record
    return None
