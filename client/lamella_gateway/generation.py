"""The jobs of one request: admitted, submitted, followed together, cancelled together.

Owns how many there are (choices), whose they are, and what happens to all when one cannot be. Neighbours: `access`,
`meter`, `repeats` (before), `live_board` (after), the routes (which turn events into answers).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from lamella import (
    Cancelled,
    ChatMessage,
    Done,
    Failed,
    JobNotFound,
    LamellaError,
    Priority,
    Progress,
    SamplingParams,
    StreamItem,
    Usage,
)
from lamella.embed_draft import EmbedOptions, draft_embed
from lamella.embedding import EmbeddingsEvent, Pooling
from lamella.messages import TokenEvent
from lamella.queue_terms import expected_cost
from lamella.request_draft import SubmitOptions, draft_request
from lamella_gateway.access import Caller
from lamella_gateway.api_error import SERVER, ApiError, from_lamella, job_failure
from lamella_gateway.follower import Follower
from lamella_gateway.meter import Attachment, Bill
from lamella_gateway.repeats import Repeat, jobs_before
from lamella_gateway.request_base import SEED_BITS
from lamella_gateway.service import Service
from lamella_gateway.tool_request import NO_TERMS, ToolTerms

Event = TokenEvent | Done | Progress
AnyEvent = Event | Failed | Cancelled
StoredEvent = AnyEvent | EmbeddingsEvent


@dataclass(frozen=True)
class Choice:
    """One job to be: a prompt or a chat, and how its tokens are chosen."""

    sampling: SamplingParams
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None

    def tokens(self, model: str, tools: ToolTerms = NO_TERMS) -> int:
        """Return how many tokens it may take, prompt included; raises RequestError for what no job can be."""
        options = SubmitOptions(
            model=model,
            messages=self.messages,
            sampling=self.sampling,
            tools=tools.tools,
            tool_choice=tools.choice,
        )
        cost = expected_cost(draft_request(self.prompt, options).request(model))
        return cost.prompt + cost.answer


@dataclass(frozen=True)
class Texts:
    """One job of embeddings to be."""

    texts: tuple[str, ...]
    pooling: Pooling = "mean"
    is_normalised: bool = True

    def tokens(self, model: str, tools: ToolTerms = NO_TERMS) -> int:
        """Return how many tokens it may take; raises RequestError for what no job can be."""
        cost = expected_cost(draft_embed(model, self.texts, EmbedOptions(pooling=self.pooling)).request(model))
        return cost.prompt + cost.answer


@dataclass(frozen=True)
class Order:
    """What a request asks for."""

    model: str
    choices: tuple[Choice | Texts, ...]
    repeat: Repeat
    user: str | None = None
    tier: str | None = None
    response: str = ""
    response_format: Mapping[str, object] | None = None
    tools: ToolTerms = NO_TERMS
    goes_on_alone: bool = False  # whether its jobs outlive the connection

    @property
    def priority(self) -> Priority:
        """The class its jobs wait in."""
        return Priority.LOW if self.tier == "flex" else Priority.NORMAL


@dataclass
class Generation:
    """The jobs of one request, in the order of its choices; changed by `begin` and by its one reader."""

    service: Service
    job_ids: list[str]
    goes_on_alone: bool
    followers: list[Follower] = field(default_factory=list)
    is_open: bool = True

    async def batches(self) -> AsyncGenerator[list[tuple[int, Event]], None]:
        """Yield ``(choice, event)`` as they come, in batches, until every job is done.

        Raises:
            ApiError: a job failed or was cancelled; the others are cancelled.
        """
        try:
            async with aclosing(self._events()) as events:
                async for index, batch in events:
                    yield [(index, _good(event)) for event in _answers(batch)]
        except ApiError:
            await self.cancel()
            raise

    async def raw(self) -> AsyncGenerator[list[AnyEvent], None]:
        """Yield the events of the only job as they come, in batches, whatever the last one is; raises ApiError."""
        async with aclosing(self._events()) as events:
            async for _, batch in events:
                yield _answers(batch)

    async def vectors(self) -> tuple[EmbeddingsEvent, Usage]:
        """Return what the only job brought, a job of embeddings.

        Raises:
            ApiError: it failed or was cancelled.
        """
        found, usage = None, None
        async with aclosing(self._events()) as events:
            async for _, batch in events:
                for event in batch:
                    if isinstance(event, EmbeddingsEvent):
                        found = event
                    elif isinstance(good := _good(event), Done):
                        usage = good.usage
        if found is not None and usage is not None:
            return found, usage
        raise ApiError(500, "the vectors are no longer stored; ask for them again", type=SERVER, code="vectors_gone")

    async def _events(self) -> AsyncGenerator[tuple[int, list[StoredEvent]], None]:
        try:
            for job_id in self.job_ids:
                self.followers.append(await self.service.board.follow(job_id))
            async with aclosing(_merged(self.followers)) as merged:
                async for index, items in merged:
                    yield index, [item.event for item in items]
            self.service.settler.ended(self.job_ids)
        except LamellaError as error:
            raise from_lamella(error) from error
        finally:
            await self.close()

    async def cancel(self) -> None:
        """Cancel what has not ended; harmless when repeated."""
        for job_id in self.job_ids:
            with contextlib.suppress(JobNotFound):
                await self.service.client.cancel(job_id)
        self.service.settler.ended(self.job_ids)

    async def abandon(self) -> None:
        """Note that nobody waits any more: the jobs are cancelled, unless they were to go on alone."""
        self.service.metrics.disconnects.inc()
        if not self.goes_on_alone:
            await self.cancel()

    async def close(self) -> None:
        """Stop following; the jobs go on. Harmless when repeated."""
        if not self.is_open:
            return
        self.is_open = False
        self.service.streams.leave()
        for follower in self.followers:
            await self.service.board.leave(follower)


async def begin(service: Service, caller: Caller, order: Order) -> Generation:
    """Submit a request's jobs, or find those of an earlier, equal one.

    Raises:
        ApiError: it may not, cannot, or should come back later; nothing was left behind.
    """
    service.streams.enter()
    try:
        job_ids = await jobs_before(service, order.repeat, len(order.choices))
        if not job_ids:
            job_ids = await _submit(service, caller, order)
    except LamellaError as error:
        service.streams.leave()
        raise from_lamella(error) from error
    except BaseException:
        service.streams.leave()
        raise
    return Generation(service, job_ids, order.goes_on_alone or order.repeat.key is not None)


async def _submit(service: Service, caller: Caller, order: Order) -> list[str]:
    bills = await _admit(service, caller, order)
    tasks = [asyncio.create_task(_submit_one(service, caller, order, index)) for index in range(len(order.choices))]
    try:
        results = await asyncio.gather(*tasks, return_exceptions=True)
    except asyncio.CancelledError:
        await asyncio.wait(tasks)
        raise
    errors = [result for result in results if isinstance(result, BaseException)]
    job_ids = [result for result in results if isinstance(result, str)]
    for result, bill in zip(results, bills, strict=True):
        if isinstance(result, BaseException):
            await service.meter.refund(bill)
        else:
            whole = Attachment(bill, order.response, order.repeat.digest, " ".join(job_ids))
            await service.meter.attach(result, Attachment(bill) if errors else whole)
    if errors:
        for job_id in job_ids:
            await service.client.cancel(job_id)
        service.settler.ended(job_ids)
        raise errors[0]
    return job_ids


async def _admit(service: Service, caller: Caller, order: Order) -> list[Bill | None]:
    """Reserve what each job may use."""
    if caller.key is None:
        return [None] * len(order.choices)
    tokens = [choice.tokens(order.model, order.tools) for choice in order.choices]
    day = await service.meter.admit(caller.key, sum(tokens))
    return [Bill(caller.key.key_id, day, each) for each in tokens]


async def _submit_one(service: Service, caller: Caller, order: Order, index: int) -> str:
    choice = order.choices[index]
    if isinstance(choice, Texts):
        return await _submit_texts(service, caller, order, choice)
    options = SubmitOptions(
        model=order.model,
        sampling=choice.sampling,
        user=caller.user or order.user,
        priority=order.priority,
        # The model was looked up a moment ago; only with encryption is there more to be sure of.
        require_worker=service.connection.ring is not None,
    )
    if order.response_format is not None:
        options["response_format"] = order.response_format
    if order.tools.tools is not None:
        options["tools"] = order.tools.tools
        options["tool_choice"] = order.tools.choice
    if choice.messages is not None:
        options["messages"] = choice.messages
    if order.repeat.key is not None:
        options["idempotency_key"] = f"{order.repeat.key}:{index}"
    return (await service.client.submit(choice.prompt, **options)).id


async def _submit_texts(service: Service, caller: Caller, order: Order, choice: Texts) -> str:
    options = EmbedOptions(
        pooling=choice.pooling,
        normalised=choice.is_normalised,
        user=caller.user or order.user,
        priority=order.priority,
        require_worker=service.connection.ring is not None,
    )
    if order.repeat.key is not None:
        options["idempotency_key"] = f"{order.repeat.key}:0"
    return (await service.client.submit_embed(order.model, choice.texts, **options)).id


def with_seeds(choice: Choice, count: int) -> list[Choice]:
    """Return `count` choices alike but for their seeds: the first has the one given, each other one made from it."""
    seed = choice.sampling.seed
    if seed is None:
        return [choice] * count
    return [replace(choice, sampling=choice.sampling.model_copy(update={"seed": _seed(seed, i)})) for i in range(count)]


def _seed(seed: int, index: int) -> int:
    if index == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def _answers(batch: list[StoredEvent]) -> list[AnyEvent]:
    return [event for event in batch if not isinstance(event, EmbeddingsEvent)]


def _good(event: AnyEvent) -> Event:
    if isinstance(event, Failed):
        raise job_failure(event.code, event.message)
    if isinstance(event, Cancelled):
        raise ApiError(409, "the job was cancelled before its end", code="cancelled")
    return event


async def _merged(followers: Sequence[Follower]) -> AsyncGenerator[tuple[int, list[StreamItem]], None]:
    if len(followers) == 1:
        while items := await followers[0].next_items():
            yield 0, items
        return
    waiting = {asyncio.create_task(each.next_items()): index for index, each in enumerate(followers)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda each: waiting[each]):
                index = waiting.pop(task)
                if items := await task:
                    waiting[asyncio.create_task(followers[index].next_items())] = index
                    yield index, items
    finally:
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting)
