"""``/v1/responses``: answers that can be fetched, followed and resumed later, made now or in the background."""

from __future__ import annotations

import json
import time
from contextlib import aclosing
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lamella import Cancelled, ChatMessage, Done, Failed, JobState
from lamella_gateway import service as services
from lamella_gateway.access import Caller, identify
from lamella_gateway.answer import Answer
from lamella_gateway.answer_format import queue_format
from lamella_gateway.api_error import ApiError
from lamella_gateway.api_keys import Endpoint
from lamella_gateway.body import parse, read_body
from lamella_gateway.generation import Generation, begin
from lamella_gateway.input_item import input_messages
from lamella_gateway.live_response import EVENT_STREAM, SSE_COMMENT, WHOLE, Form, LiveResponse, Pieces
from lamella_gateway.message_text import turn
from lamella_gateway.order import Choice, Order
from lamella_gateway.repeats import NO_REPEAT, Repeat, recognise
from lamella_gateway.response_events import ResponseEvents
from lamella_gateway.response_record import (
    ResponseRecord,
    StoredResponse,
    conversation,
    encode_record,
    find_response,
    job_id_of,
    record_of,
    response_id,
)
from lamella_gateway.response_request import ResponseRequest
from lamella_gateway.response_shapes import DeletedBody, ResponseBody, ended_body, response_body, status_of
from lamella_gateway.service import Service
from lamella_gateway.starting_point import starting_point

Live = LiveResponse | Response


def _stream_error(error: ApiError) -> bytes:
    body = {"type": "error", "code": error.code, "message": error.message, "param": error.param, "sequence_number": -1}
    return b"event: error\ndata: " + json.dumps(body).encode() + b"\n\n"


EVENTS = Form(EVENT_STREAM, SSE_COMMENT, _stream_error)


async def create_response(request: Request) -> Live:
    """Answer an input: now, as a stream, or in the background."""
    service = services.of(request)
    caller = await identify(request, Endpoint.RESPONSES)
    body = await read_body(request)
    asked = parse(ResponseRequest, body)
    caller.check_model(asked.model)
    info = await service.models.find(asked.model)
    most = min(service.settings.default_max_tokens, info.context_length)
    before: tuple[ChatMessage, ...] = ()
    if asked.previous_response_id is not None:
        before = await _before(service, caller, asked.previous_response_id)
    order, record = response_order(asked, most, before, recognise(request, service, caller, body))
    if record.store:
        order = replace(order, response=encode_record(record, service.connection.ring))
    generation = await begin(service, caller, order)
    made = response_id(generation.job_ids[0])
    now = time.time()
    if asked.stream:
        events = ResponseEvents(made, record, now)
        return LiveResponse(_events(generation, events), EVENTS, generation, service.settings, events.begin())
    if record.background:
        await generation.close()
        return JSONResponse(response_body(made, record, now, "queued"))
    return LiveResponse(_whole(generation, made, record, now), WHOLE, generation, service.settings)


async def stored_response(request: Request) -> Live:
    """Fetch a response, or delete it."""
    service, stored = await _stored(request)
    if request.method == "DELETE":
        return await _delete(service, stored)
    return await _retrieve(request, service, stored)


async def _retrieve(request: Request, service: Service, stored: StoredResponse) -> Live:
    """Return a response as it is now; with ``stream=true`` its events, from ``starting_after`` on."""
    after = starting_point(request)
    if after is None:
        return JSONResponse(await _body(service, stored))
    service.streams.enter()
    generation = Generation(service, [job_id_of(stored.response_id)], goes_on_alone=True)
    events = ResponseEvents(stored.response_id, stored.record, stored.status.created_at, after)
    pieces = _events(generation, events, stored.status.finished_at)
    return LiveResponse(pieces, EVENTS, generation, service.settings, events.begin())


async def cancel_response(request: Request) -> Live:
    """Cancel a response that is made in the background; one that has ended stays as it is."""
    service, stored = await _stored(request)
    if not stored.record.background:
        raise ApiError(
            400,
            "only a response that was made with background: true can be cancelled; one that is streamed ends when its "
            "client leaves",
            param="response_id",
            code="not_in_background",
        )
    await service.client.cancel(job_id_of(stored.response_id))
    _, stored = await _stored(request)
    body = await _body(service, stored)
    if not stored.status.state.is_final:
        body["status"] = "cancelled"  # its worker stops at the next sweep
    return JSONResponse(body)


async def _delete(service: Service, stored: StoredResponse) -> Live:
    """Delete a response: it cannot be fetched any more; its job is cancelled, and goes as soon as it has ended."""
    job_id = job_id_of(stored.response_id)
    if not stored.status.state.is_final:
        await service.client.cancel(job_id)
    await service.meter.forget(job_id)
    return JSONResponse(DeletedBody(id=stored.response_id, object="response", deleted=True))


async def _stored(request: Request) -> tuple[Service, StoredResponse]:
    service = services.of(request)
    caller = await identify(request, Endpoint.RESPONSES)
    return service, await find_response(service.connection, caller, request.path_params["response_id"])


def response_order(
    asked: ResponseRequest, default_tokens: int, before: tuple[ChatMessage, ...] = (), repeat: Repeat = NO_REPEAT
) -> tuple[Order, ResponseRecord]:
    """Return the job of a request, and what is to be remembered of it; `before` is what it goes on from."""
    sampling = asked.base_sampling(asked.max_output_tokens or default_tokens)
    sampling = sampling.model_copy(update={"logprobs": asked.num_logprobs})
    record = record_of(asked, sampling)
    order = Order(
        asked.model,
        (Choice(sampling, messages=_messages(asked, before)),),
        repeat,
        user=asked.user,
        tier=asked.service_tier,
        response_format=queue_format(asked.format),
        tools=asked.tool_terms,
        goes_on_alone=record.background,
    )
    return order, record


def _messages(asked: ResponseRequest, before: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
    """Return what the model is to read: instructions, what came before, the input."""
    head = () if asked.instructions is None else (turn("system", asked.instructions),)
    if isinstance(asked.input, str):
        return (*head, *before, turn("user", asked.input))
    return (*head, *before, *input_messages(asked.input))


async def _before(service: Service, caller: Caller, given: str) -> tuple[ChatMessage, ...]:
    try:
        stored = await find_response(service.connection, caller, given)
    except ApiError as error:
        message = f"previous_response_id: {error.message}"
        raise ApiError(404, message, param="previous_response_id", code="previous_response_not_found") from error
    if stored.status.state is not JobState.DONE:
        raise ApiError(
            400,
            f"the response {given[:80]} is {stored.status.state.value}; only one that has ended can be gone on from",
            param="previous_response_id",
            code="previous_response_not_done",
        )
    done = await service.client.job(job_id_of(given)).result(timeout_s=READ_S)
    return await conversation(service.connection, stored, done)


READ_S = 30.0  # an ended job's events are all stored


async def _body(service: Service, stored: StoredResponse) -> ResponseBody:
    """Return a response as it is now; what has come of one that goes on is told when it has ended."""
    status = stored.status
    base = response_body(
        stored.response_id, stored.record, status.created_at, status_of(status, stored.record.background)
    )
    if status.outcome is None:
        return base
    job = service.client.job(job_id_of(stored.response_id))
    answer = Answer(job.id, one_call=not stored.record.parallel_tool_calls)
    async with aclosing(job.stream(timeout_s=READ_S)) as items:
        async for item in items:
            if item.event.type != "embeddings":
                answer.add(item.event)
    return ended_body(base, answer, status.outcome, status.finished_at)


async def _events(generation: Generation, events: ResponseEvents, ended_at: float | None = None) -> Pieces:
    async with aclosing(generation.raw()) as batches:
        async for batch in batches:
            yield b"".join([events.add(event, ended_at or time.time()) for event in batch])


async def _whole(generation: Generation, made: str, record: ResponseRecord, created_at: float) -> Pieces:
    answer = Answer(job_id_of(made), one_call=not record.parallel_tool_calls)
    base = response_body(made, record, created_at, "in_progress")
    async with aclosing(generation.raw()) as batches:
        async for batch in batches:
            for event in batch:
                answer.add(event)
                if isinstance(event, Done | Failed | Cancelled):
                    base = ended_body(base, answer, event, time.time())
    yield json.dumps(base).encode()
