"""``POST /v1/completions``: texts gone on with, whole or token by token."""

from __future__ import annotations

import json
import time
from contextlib import aclosing

from starlette.requests import Request

from lamella import Done, Progress, TokenEvent
from lamella_gateway import service as services
from lamella_gateway.access import identify
from lamella_gateway.answer import Answer
from lamella_gateway.api_keys import Endpoint
from lamella_gateway.body import parse, read_body
from lamella_gateway.chat_shapes import UsageBody, usage_body
from lamella_gateway.completion_request import DEFAULT_TOKENS, CompletionRequest
from lamella_gateway.completion_shapes import CompletionBody, CompletionChoiceBody
from lamella_gateway.generation import Event, Generation, begin
from lamella_gateway.live_response import CHUNKS, WHOLE, LiveResponse, Pieces
from lamella_gateway.logprobs import completion_logprobs
from lamella_gateway.order import Choice, Order, with_seeds
from lamella_gateway.repeats import NO_REPEAT, Repeat, recognise
from lamella_gateway.service import FINGERPRINT

DONE = b"data: [DONE]\n\n"


async def completions(request: Request) -> LiveResponse:
    """Go on with texts."""
    service = services.of(request)
    caller = await identify(request, Endpoint.COMPLETIONS)
    body = await read_body(request)
    asked = parse(CompletionRequest, body)
    caller.check_model(asked.model)
    await service.models.find(asked.model)
    order = completion_order(asked, recognise(request, service, caller, body))
    generation = await begin(service, caller, order)
    if asked.stream:
        return LiveResponse(_chunks(generation, asked), CHUNKS, generation, service.settings)
    return LiveResponse(_whole(generation, asked), WHOLE, generation, service.settings)


def completion_order(asked: CompletionRequest, repeat: Repeat = NO_REPEAT) -> Order:
    """Return the jobs of a request: as many as it asks choices of each text."""
    sampling = asked.choice_sampling(asked.max_tokens or DEFAULT_TOKENS, asked.logprobs)
    choices = [one for text in asked.prompts for one in with_seeds(Choice(sampling, prompt=text), asked.n or 1)]
    return Order(asked.model, tuple(choices), repeat, user=asked.user)


def completion_body(asked: CompletionRequest, answers: list[Answer]) -> CompletionBody:
    """Return what goes on with the texts."""
    body = _body(answers[0].job_id, asked, int(time.time()))
    for index, answer in enumerate(answers):
        told = completion_logprobs(answer.logprobs, 0, asked.logprobs) if asked.logprobs is not None else None
        body["choices"].append(
            CompletionChoiceBody(index=index, text=answer.text, logprobs=told, finish_reason=answer.stop_reason)
        )
    body["usage"] = _usage(answers, asked)
    return body


def _body(job_id: str, asked: CompletionRequest, created: int) -> CompletionBody:
    return CompletionBody(
        id=f"cmpl-{job_id}",
        object="text_completion",
        created=created,
        model=asked.model,
        system_fingerprint=FINGERPRINT,
        choices=[],
    )


def _usage(answers: list[Answer], asked: CompletionRequest) -> UsageBody:
    """Return what all of it cost; each prompt counts once."""
    num = asked.n or 1
    firsts = [
        usage_body([answer.usage for answer in answers[at : at + num]], shares_prompt=True)
        for at in range(0, len(answers), num)
    ]
    prompt = sum(each["prompt_tokens"] for each in firsts)
    completion = sum(each["completion_tokens"] for each in firsts)
    return UsageBody(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def _chunks(generation: Generation, asked: CompletionRequest) -> Pieces:
    base = _body(generation.job_ids[0], asked, int(time.time()))
    answers = [Answer(job_id) for job_id in generation.job_ids]
    lengths = [0] * len(answers)
    async with aclosing(generation.batches()) as batches:
        async for batch in batches:
            pieces = []
            for index, event in batch:
                answers[index].add(event)
                if (choice := _choice(index, event, lengths[index], asked)) is not None:
                    lengths[index] += len(choice["text"])
                    pieces.append(_sse({**base, "choices": [choice]}, asked))
            yield b"".join(pieces)
    last = _sse({**base, "usage": _usage(answers, asked)}, asked) if asked.wants_usage else b""
    yield last + DONE


def _choice(index: int, event: Event, offset: int, asked: CompletionRequest) -> CompletionChoiceBody | None:
    match event:
        case TokenEvent(text=text, logprobs=logprobs) if text or logprobs:
            told = None if logprobs is None else completion_logprobs(logprobs, offset, asked.logprobs or 0)
            return CompletionChoiceBody(index=index, text=text, logprobs=told, finish_reason=None)
        case Done(finish_reason=reason):
            return CompletionChoiceBody(index=index, text="", logprobs=None, finish_reason=reason)
        case TokenEvent() | Progress():
            return None


def _sse(body: CompletionBody, asked: CompletionRequest) -> bytes:
    if asked.wants_usage:
        body.setdefault("usage", None)
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def _whole(generation: Generation, asked: CompletionRequest) -> Pieces:
    answers = [Answer(job_id) for job_id in generation.job_ids]
    async with aclosing(generation.batches()) as batches:
        async for batch in batches:
            for index, event in batch:
                answers[index].add(event)
    yield json.dumps(completion_body(asked, answers)).encode()
