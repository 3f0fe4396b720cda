"""``POST /v1/chat/completions``: a chat answered, whole or token by token."""

from __future__ import annotations

import json
import time
from contextlib import aclosing

from starlette.requests import Request

from lamella import Done
from lamella_gateway import service as services
from lamella_gateway.access import identify
from lamella_gateway.answer import Added, Answer
from lamella_gateway.answer_format import queue_format
from lamella_gateway.api_keys import Endpoint
from lamella_gateway.body import parse, read_body
from lamella_gateway.chat_request import ChatRequest
from lamella_gateway.chat_shapes import (
    ChatBody,
    ChatChoiceBody,
    ChunkWriter,
    logprobs_body,
    message_body,
    usage_body,
)
from lamella_gateway.generation import Generation, begin
from lamella_gateway.live_response import CHUNKS, WHOLE, LiveResponse, Pieces
from lamella_gateway.order import Choice, Order, with_seeds
from lamella_gateway.repeats import NO_REPEAT, Repeat, recognise
from lamella_gateway.service import FINGERPRINT

DONE = b"data: [DONE]\n\n"


async def chat_completions(request: Request) -> LiveResponse:
    """Answer a chat."""
    service = services.of(request)
    caller = await identify(request, Endpoint.CHAT)
    body = await read_body(request)
    asked = parse(ChatRequest, body)
    caller.check_model(asked.model)
    info = await service.models.find(asked.model)
    most = min(service.settings.default_max_tokens, info.context_length)
    order = chat_order(asked, most, recognise(request, service, caller, body))
    generation = await begin(service, caller, order)
    if not asked.stream:
        return LiveResponse(_whole(generation, asked), WHOLE, generation, service.settings)
    envelope = _envelope(generation.job_ids[0], asked, "chat.completion.chunk")
    writer = ChunkWriter(envelope, tells_usage=asked.wants_usage)
    head = b"".join(writer.role(index) for index in range(len(generation.job_ids)))
    return LiveResponse(_chunks(generation, asked, writer), CHUNKS, generation, service.settings, head)


def chat_order(asked: ChatRequest, default_tokens: int, repeat: Repeat = NO_REPEAT) -> Order:
    """Return the jobs of a chat; `default_tokens` is how long its answer may be where it does not say."""
    choice = Choice(
        asked.choice_sampling(asked.limit or default_tokens, asked.num_logprobs),
        messages=tuple(turn.message() for turn in asked.messages),
    )
    return Order(
        asked.model,
        tuple(with_seeds(choice, asked.n or 1)),
        repeat,
        user=asked.user,
        tier=asked.service_tier,
        response_format=queue_format(asked.response_format),
        tools=asked.tool_terms,
    )


def chat_body(asked: ChatRequest, answers: list[Answer]) -> ChatBody:
    """Return what answers a chat."""
    choices = [
        ChatChoiceBody(
            index=index,
            message=message_body(answer),
            logprobs=logprobs_body(answer.logprobs) if asked.logprobs else None,
            finish_reason=answer.finish_reason,
        )
        for index, answer in enumerate(answers)
    ]
    usage = usage_body([answer.usage for answer in answers], shares_prompt=True)
    envelope = _envelope(answers[0].job_id, asked, "chat.completion")
    return {**envelope, "choices": choices, "usage": usage}  # type: ignore[typeddict-item]  # the envelope's fields are those of the body


def _envelope(job_id: str, asked: ChatRequest, kind: str) -> dict[str, str | int]:
    tier = {} if asked.service_tier is None else {"service_tier": "flex" if asked.service_tier == "flex" else "default"}
    return {
        "id": f"chatcmpl-{job_id}",
        "object": kind,
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": FINGERPRINT,
        **tier,
    }


def _answers(generation: Generation, asked: ChatRequest) -> list[Answer]:
    return [Answer(job_id, one_call=asked.parallel_tool_calls is False) for job_id in generation.job_ids]


def _pieces(writer: ChunkWriter, index: int, added: Added) -> list[bytes]:
    text = [writer.text(index, added.text, added.logprobs or None)] if added.text or added.logprobs else []
    return [
        *(writer.call(index, call) for call in added.more),
        *text,
        *(writer.call(index, call) for call in added.calls),
    ]


async def _chunks(generation: Generation, asked: ChatRequest, writer: ChunkWriter) -> Pieces:
    answers = _answers(generation, asked)
    async with aclosing(generation.batches()) as batches:
        async for batch in batches:
            pieces = []
            for index, event in batch:
                pieces += _pieces(writer, index, answers[index].add(event))
                if isinstance(event, Done):
                    pieces.append(writer.finish(index, answers[index].finish_reason))
            yield b"".join(pieces)
    usages = [answer.usage for answer in answers]
    last = writer.usage(usage_body(usages, shares_prompt=True)) if asked.wants_usage else b""
    yield last + DONE


async def _whole(generation: Generation, asked: ChatRequest) -> Pieces:
    answers = _answers(generation, asked)
    async with aclosing(generation.batches()) as batches:
        async for batch in batches:
            for index, event in batch:
                answers[index].add(event)
    yield json.dumps(chat_body(asked, answers)).encode()
