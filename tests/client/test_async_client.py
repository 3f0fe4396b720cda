"""The asyncio client: the same calls, many at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lamella import AsyncClient, AsyncJob, Client, Job
from lamella.embedded import EmbeddedServer
from lamella.errors import (
    IdempotencyConflict,
    JobCancelled,
    JobFailed,
    LamellaError,
    NoWorkerError,
    RequestError,
    ServerUnreachable,
    WaitTimeout,
)
from lamella.registry_calls import CancelStatus
from tests.client.acting_worker import MODEL, ActingWorker, failed, token


@pytest.fixture
async def client(embedded_server: EmbeddedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(embedded_server.url) as client:
        yield client


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_both_clients_offer_the_same_names() -> None:
    assert public(Client) == public(AsyncClient)
    assert public(Job) == public(AsyncJob)


async def test_a_job_runs_from_submit_to_result(client: AsyncClient, worker: ActingWorker) -> None:
    job = await client.submit("hello")
    worker.run(job.id, "Par", "is")

    assert (await job.result(timeout_s=40)).text == "Paris"
    assert "".join([text async for text in job.text_stream(timeout_s=40)]) == "Paris"
    assert (await job.status()).state == "done"
    assert [found.job_id for found in await client.jobs()] == [job.id]
    assert [model.name for model in await client.models()] == [MODEL]


async def test_many_streams_share_one_client(client: AsyncClient, worker: ActingWorker) -> None:
    jobs = [await client.submit(str(number)) for number in range(20)]
    results = [asyncio.create_task(job.result(timeout_s=20)) for job in jobs]
    assert len(await client.jobs(limit=100)) == 20

    for number, job in enumerate(jobs):
        worker.run(job.id, str(number))

    assert [result.text for result in await asyncio.gather(*results)] == [str(number) for number in range(20)]


async def test_generate_and_stream(client: AsyncClient, worker: ActingWorker) -> None:
    async def serve(count: int) -> None:
        served: set[str] = set()
        async with asyncio.timeout(40):
            while len(served) < count:
                for found in await client.jobs():
                    if found.state == "queued" and found.job_id not in served:
                        served.add(found.job_id)
                        worker.run(found.job_id, "a", "b")

    serving = asyncio.create_task(serve(2))

    assert (await client.generate("x", timeout_s=40)).text == "ab"
    assert [item.seq async for item in client.stream("y", timeout_s=40)] == [1, 2, 3]
    await serving


async def test_errors_are_the_same(client: AsyncClient, worker: ActingWorker) -> None:
    with pytest.raises(RequestError, match="temperature"):
        await client.submit("x", temprature=1)  # type: ignore[call-arg]  # the mistake under test
    with pytest.raises(NoWorkerError):
        await client.submit("x", model="other")
    await client.submit("x", idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        await client.submit("y", idempotency_key="k")
    job = await client.submit("x")
    with pytest.raises(WaitTimeout):
        await job.result(timeout_s=0.2)
    assert await job.cancel() is CancelStatus.CANCELLED
    with pytest.raises(JobCancelled):
        await job.result(timeout_s=40)
    job = await client.submit("x")
    worker.claim(job.id)
    worker.emit(job.id, failed())
    with pytest.raises(JobFailed):
        await job.result(timeout_s=40)


async def test_an_absent_server_is_unreachable(tmp_path: Path) -> None:
    async with AsyncClient(f"unix://{tmp_path}/none.sock", timeout_s=1.0) as client:
        with pytest.raises(ServerUnreachable):
            await client.submit("x", model="m")


async def test_a_cancelled_task_leaves_the_client_usable(client: AsyncClient, worker: ActingWorker) -> None:
    job = await client.submit("x")
    waiting = asyncio.create_task(job.result(timeout_s=20))
    worker.claim(job.id)
    worker.emit(job.id, token("a"))
    await client.jobs()

    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting

    assert (await job.status()).state == "running"


async def test_a_closed_client_says_so(embedded_server: EmbeddedServer) -> None:
    client = AsyncClient(embedded_server.url)
    await client.close()
    await client.close()

    with pytest.raises(LamellaError, match="closed"):
        await client.jobs()
