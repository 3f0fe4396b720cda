"""The jobs of one request: admitted, submitted, followed together, cancelled together.

Owns what happens to all of them when one cannot be. Neighbours: `order` (which jobs there are), `access`, `meter`,
`repeats` (before), `live_board` (after), the routes (which turn events into answers).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from lamella import (
    Cancelled,
    Done,
    Failed,
    JobNotFound,
    LamellaError,
    Progress,
    StreamItem,
    Usage,
)
from lamella.embedding import EmbeddingsEvent
from lamella.map_run import Draft
from lamella.messages import TokenEvent
from lamella.operations import submit
from lamella_gateway.access import Caller
from lamella_gateway.api_error import SERVER, ApiError, from_lamella, job_failure
from lamella_gateway.follower import Follower
from lamella_gateway.meter import Attachment, Bill
from lamella_gateway.order import Order, draft_cost
from lamella_gateway.repeats import jobs_before
from lamella_gateway.service import Service

Event = TokenEvent | Done | Progress
AnyEvent = Event | Failed | Cancelled
StoredEvent = AnyEvent | EmbeddingsEvent


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
    # The model was looked up a moment ago; only with encryption is there more to be sure of.
    drafts = order.drafts(caller.user, requires_worker=service.connection.ring is not None)
    bills = await _admit(service, caller, drafts)
    tasks = [asyncio.create_task(_submit_one(service, draft)) for draft in drafts]
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


async def _admit(service: Service, caller: Caller, drafts: Sequence[Draft]) -> list[Bill | None]:
    """Reserve what each job may use."""
    if caller.key is None:
        return [None] * len(drafts)
    tokens = [draft_cost(draft) for draft in drafts]
    day = await service.meter.admit(caller.key, sum(tokens))
    return [Bill(caller.key.key_id, day, each) for each in tokens]


async def _submit_one(service: Service, draft: Draft) -> str:
    return await service.connection.run(submit(service.connection.keys, draft, service.connection.ring))


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
