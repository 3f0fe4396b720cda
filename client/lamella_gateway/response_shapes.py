"""What responses send back: the response itself, its one message, and what it cost.

Owns the JSON of ``response``; the types are also what ``/openapi.json`` says. Neighbours: `response_record` (what was
asked), `answer` (what came), `response_events` (the same, while it comes).
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from lamella import Cancelled, Done, Failed, JobState, JobStatus
from lamella_gateway.answer import Answer, CallItem, Item, TextItem
from lamella_gateway.logprobs import ChatLogprob, chat_logprobs
from lamella_gateway.response_record import ResponseRecord

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class TextBody(TypedDict):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[object]
    logprobs: list[ChatLogprob]


class ResponseMessageBody(TypedDict):
    """The message that a response consists of."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[TextBody]


class ResponseCallBody(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputBody = ResponseMessageBody | ResponseCallBody


class InputDetails(TypedDict):
    """What of the input was cached: nothing is told."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    """What of the output was reasoning: nothing is told apart."""

    reasoning_tokens: int


class ResponseUsageBody(TypedDict):
    """What a response cost."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ErrorBody(TypedDict):
    """Why a response failed."""

    code: str
    message: str


class IncompleteBody(TypedDict):
    """Why a response ended early."""

    reason: Literal["max_output_tokens"]


class TextConfigBody(TypedDict):
    """How the output looks."""

    format: dict[str, object]


class ResponseBody(TypedDict):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    background: bool
    error: ErrorBody | None
    incomplete_details: IncompleteBody | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputBody]
    parallel_tool_calls: bool
    previous_response_id: str | None
    metadata: dict[str, str]
    service_tier: str
    store: bool
    temperature: float
    text: TextConfigBody
    tool_choice: str | dict[str, object]
    tools: list[dict[str, object]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsageBody | None
    user: str | None


class DeletedBody(TypedDict):
    """A response is gone."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


def response_body(response_id: str, record: ResponseRecord, created_at: float, status: Status) -> ResponseBody:
    """Return a response of which nothing has come yet."""
    return ResponseBody(
        id=response_id,
        object="response",
        created_at=int(created_at),
        completed_at=None,
        status=status,
        background=record.background,
        error=None,
        incomplete_details=None,
        instructions=record.instructions,
        max_output_tokens=record.max_output_tokens,
        model=record.model,
        output=[],
        parallel_tool_calls=record.parallel_tool_calls,
        previous_response_id=record.previous_response_id,
        metadata=record.metadata or {},
        service_tier=record.service_tier,
        store=record.store,
        temperature=record.temperature,
        text=TextConfigBody(format=record.text_format or {"type": "text"}),
        tool_choice=record.tool_choice,
        tools=list(record.tools),
        top_logprobs=record.top_logprobs or 0,
        top_p=record.top_p,
        truncation=record.truncation,
        usage=None,
        user=record.user,
    )


def item_body(response_id: str, index: int, item: Item, status: ItemStatus) -> OutputBody:
    """Return an item of a response's output, `index` being its place there."""
    if isinstance(item, CallItem):
        return ResponseCallBody(
            id=item_id(response_id, index, item),
            type="function_call",
            status=status,
            call_id=item.call_id,
            name=item.name,
            arguments=item.arguments,
        )
    return ResponseMessageBody(
        id=item_id(response_id, index, item),
        type="message",
        status=status,
        role="assistant",
        content=[text_body(item)],
    )


def item_id(response_id: str, index: int, item: Item) -> str:
    """Return the id of an item."""
    kind = "fc_" if isinstance(item, CallItem) else "msg_"
    return response_id.replace("resp_", kind, 1) + (f"_{index}" if index else "")


def text_body(item: TextItem) -> TextBody:
    """Return the text of a message."""
    return TextBody(type="output_text", text=item.text, annotations=[], logprobs=chat_logprobs(item.logprobs))


def output_items(answer: Answer, is_done: bool) -> list[Item]:
    """Return what an ended answer consists of: an empty message at least, unless it broke off before anything came."""
    if not answer.items and (is_done or (answer.has_begun and not answer.may_call)):
        return [TextItem()]
    return answer.items


def ended_body(
    base: ResponseBody, answer: Answer, end: Done | Failed | Cancelled, ended_at: float | None
) -> ResponseBody:
    """Return a response that has ended, with what came of it."""
    body = ResponseBody(**base)
    item_status: ItemStatus = "incomplete"
    match end:
        case Done(finish_reason="stop"):
            body["status"], item_status = "completed", "completed"
            body["completed_at"] = None if ended_at is None else int(ended_at)
        case Done():
            body["status"] = "incomplete"
            body["incomplete_details"] = IncompleteBody(reason="max_output_tokens")
        case Failed(code=code, message=message):
            body["status"] = "failed"
            body["error"] = error_body(code, message)
        case Cancelled():
            body["status"] = "cancelled"
    if isinstance(end, Done):
        body["usage"] = _usage(end)
    items = output_items(answer, isinstance(end, Done))
    body["output"] = [
        item_body(base["id"], index, item, item_status if index == len(items) - 1 else "completed")
        for index, item in enumerate(items)
    ]
    return body


def error_body(code: str, message: str) -> ErrorBody:
    """Return why a response failed; OpenAI's clients know few codes, so the own one is put before the message."""
    shown = "invalid_prompt" if code.startswith(("prompt_", "no_chat")) else "server_error"
    return ErrorBody(code=shown, message=f"{code}: {message}")


def status_of(status: JobStatus, background: bool) -> Status:
    """Return where a response stands whose job has not ended."""
    return "queued" if status.state is JobState.QUEUED and background else "in_progress"


def _usage(done: Done) -> ResponseUsageBody:
    prompt, completion = done.usage.prompt_tokens, done.usage.completion_tokens
    return ResponseUsageBody(
        input_tokens=prompt,
        input_tokens_details=InputDetails(cached_tokens=0, cache_write_tokens=0),
        output_tokens=completion,
        output_tokens_details=OutputDetails(reasoning_tokens=0),
        total_tokens=prompt + completion,
    )
