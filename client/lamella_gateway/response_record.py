"""What is remembered of a response: everything its job's record and events do not tell, as a field of that record.

The response's id is its job's, so no table maps one to the other, and it expires with the job. Where jobs are encrypted
the record is too. Owns the record's form, reading and finding; neighbours: `responses`, `response_shapes`.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import ValidationError

from lamella import ChatMessage, Completion, DecodeError, JobStatus
from lamella.connection import AsyncConnection
from lamella.embedding import EmbedRequest
from lamella.job_seal import JobSeal, seal_request
from lamella.key_ring import KeyRing
from lamella.keys import Keys
from lamella.messages import SamplingParams, Wire, decode_request
from lamella.records import STATUS_FIELDS, decode_status
from lamella.steps import Operation, answers, commands
from lamella_gateway.access import Caller
from lamella_gateway.api_error import ApiError
from lamella_gateway.response_request import ResponseRequest
from lamella_gateway.tool_request import ResponseChoice, ResponseTool

_ID = re.compile(r"resp_([0-9a-f]{32})", re.ASCII)
_SEAL_ORIGIN = "response"  # boxes of records are made for no job, because they are closed before there is one


class ResponseRecord(Wire):
    """What of a request comes back with its response, and what its continuation must know."""

    version: Literal[1] = 1
    model: str
    background: bool
    has_instructions: bool
    instructions: str | None
    previous_response_id: str | None
    metadata: dict[str, str] | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int | None
    parallel_tool_calls: bool
    service_tier: str
    truncation: str
    user: str | None
    store: bool
    text_format: dict[str, object] | None = None
    tools: tuple[dict[str, object], ...] = ()
    tool_choice: str | dict[str, object] = "auto"


class StoredResponse(Wire):
    """A response that was asked for by its id, and where its job stands."""

    response_id: str
    record: ResponseRecord
    status: JobStatus


def response_id(job_id: str) -> str:
    """Return the id of the response that a job brings."""
    return f"resp_{job_id}"


def job_id_of(given: str) -> str:
    """Return the job behind a response's id; raises ApiError (404) for what is no such id."""
    found = _ID.fullmatch(given)
    if found is None:
        raise not_found(given)
    return found[1]


def not_found(given: str) -> ApiError:
    """Return the error for a response that is not there, or not the caller's."""
    return ApiError(
        404,
        f"there is no response {given[:80]!r}: the id is wrong, it was deleted, it has expired, or it was made with "
        "store: false",
        param="response_id",
        code="response_not_found",
    )


def record_of(asked: ResponseRequest, sampling: SamplingParams) -> ResponseRecord:
    """Return what is to be remembered of a request."""
    return ResponseRecord(
        model=asked.model,
        background=bool(asked.background),
        has_instructions=asked.instructions is not None,
        instructions=asked.instructions,
        previous_response_id=asked.previous_response_id,
        metadata=asked.metadata,
        max_output_tokens=asked.max_output_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_logprobs=asked.num_logprobs,
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        service_tier="flex" if asked.service_tier == "flex" else "default",
        truncation="disabled",
        user=asked.user,
        store=asked.store is not False,
        text_format=None if asked.format is None else asked.format.model_dump(by_alias=True, exclude_none=True),
        tools=tuple({"description": None, "strict": False, **_shown(tool)} for tool in asked.tools or ()),
        tool_choice=asked.tool_choice if isinstance(asked.tool_choice, str) else _shown(asked.tool_choice) or "auto",
    )


def _shown(part: ResponseTool | ResponseChoice | None) -> dict[str, object]:
    return {} if part is None else part.model_dump(exclude_none=True)


def encode_record(record: ResponseRecord, ring: KeyRing | None) -> str:
    """Return a record as it is stored."""
    text = record.model_dump_json(exclude_none=False)
    return text if ring is None else seal_request(ring, _SEAL_ORIGIN, text)


async def find_response(connection: AsyncConnection, caller: Caller, given: str) -> StoredResponse:
    """Return a response by its id.

    Raises:
        ApiError: 404 where there is none, or it is not the caller's.
    """
    job_id = job_id_of(given)
    text, status = await connection.run(_read(connection.keys, job_id))
    if text is None or status is None or not caller.owns(status):
        raise not_found(given)
    try:
        record = ResponseRecord.model_validate_json(JobSeal(connection.ring).open_request(text))
    except ValidationError as error:
        raise DecodeError(f"the response of job {job_id} is not of a form this version reads") from error
    return StoredResponse(response_id=given, record=record, status=status)


async def conversation(
    connection: AsyncConnection, stored: StoredResponse, output: Completion
) -> tuple[ChatMessage, ...]:
    """Return the messages that led to a response, and its output; its instructions do not carry over."""
    job_id = job_id_of(stored.response_id)
    text = await connection.run(_request(connection.keys, job_id))
    if text is None:
        raise not_found(stored.response_id)
    request = decode_request(JobSeal(connection.ring).open_request(text))
    messages = () if isinstance(request, EmbedRequest) else request.messages or ()
    before = messages[1:] if stored.record.has_instructions else messages
    calls = output.tool_calls if stored.record.parallel_tool_calls else output.tool_calls[:1]
    said = output.text or None if calls else output.text
    return (*before, ChatMessage(role="assistant", content=said, tool_calls=calls or None))


def _read(keys: Keys, job_id: str) -> Operation[tuple[str | None, JobStatus | None]]:
    raw = yield commands(("HMGET", keys.job(job_id), "response", *STATUS_FIELDS))
    text, *values = answers(answers(raw)[0])
    return (None if text is None else str(text)), decode_status(job_id, values)


def _request(keys: Keys, job_id: str) -> Operation[str | None]:
    raw = yield commands(("HMGET", keys.job(job_id), "request"))
    text = answers(answers(raw)[0])[0]
    return None if text is None else str(text)
