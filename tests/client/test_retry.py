"""A dead job goes on as a new one, after its last token; nothing else does."""

from __future__ import annotations

import json

import pytest
import redis
from typer.testing import CliRunner

from lamella import AsyncClient, Client, Done, Failed, JobNotFound, JobState, RequestError, TokenEvent
from lamella.cli import app
from lamella.embedded import EmbeddedServer
from lamella.errors import QueueFull
from lamella.job import Job
from lamella.keys import Keys
from lamella.registry_calls import ClaimStatus
from tests.client.acting_worker import MODEL, ActingWorker, done, failed, token

KEYS = Keys()
TEXT = ["One", " two", " three"]


@pytest.fixture
def dead(client: Client, worker: ActingWorker, embedded_redis: redis.Redis) -> Job:
    """A job with three tokens whose attempts are used up."""
    job = client.submit("count", model=MODEL, temperature=0.7, seed=5)
    worker.claim(job.id)
    worker.emit(job.id, *(token(text, number) for number, text in enumerate(TEXT)))
    embedded_redis.hset(KEYS.job(job.id), mapping={"attempts": 3, "lease_until": 1})
    assert worker.claim(job.id).status is ClaimStatus.POISON
    return job


def test_a_retried_job_begins_with_the_tokens_of_the_dead_one_and_its_request(
    client: Client, worker: ActingWorker, dead: Job, embedded_redis: redis.Redis
) -> None:
    job = client.retry(dead.id)

    assert job.id != dead.id
    assert (job.status().state, job.status().attempts, job.status().events) == (JobState.QUEUED, 0, 3)
    claim = worker.claim(job.id)
    assert (claim.status, claim.seq, claim.attempts) == (ClaimStatus.OK, 3, 1)
    assert claim.request_json == embedded_redis.hget(KEYS.job(dead.id), "request")
    worker.seqs[job.id] = claim.seq
    worker.emit(job.id, token(" four", 9), done(4))
    items = [item for item in job.stream() if item.seq is not None]
    assert [item.seq for item in items] == [1, 2, 3, 4, 5]
    assert "".join(item.event.text for item in items if isinstance(item.event, TokenEvent)) == "One two three four"
    assert isinstance(items[-1].event, Done)
    assert isinstance(list(dead.stream())[-1].event, Failed), "the dead one stays as it was"


def test_retrying_twice_gives_the_same_job_and_one_message(
    client: Client, dead: Job, embedded_redis: redis.Redis
) -> None:
    before = embedded_redis.llen(KEYS.queue_list(MODEL))

    jobs = {client.retry(dead.id).id for _ in range(3)}

    assert len(jobs) == 1
    assert embedded_redis.llen(KEYS.queue_list(MODEL)) == before + 1


def test_a_dead_job_whose_tokens_are_gone_begins_anew(client: Client, dead: Job, embedded_redis: redis.Redis) -> None:
    embedded_redis.xdel(KEYS.stream(dead.id), "2-0")

    job = client.retry(dead.id)

    assert job.status().events == 0
    assert embedded_redis.exists(KEYS.stream(job.id)) == 0


@pytest.mark.parametrize("state", ["queued", "running", "done", "failed otherwise"])
def test_only_a_dead_job_can_be_retried(
    client: Client, worker: ActingWorker, state: str, embedded_redis: redis.Redis
) -> None:
    job = client.submit("hello", model=MODEL)
    if state != "queued":
        worker.claim(job.id)
    if state == "done":
        worker.emit(job.id, token("a"), done())
    if state == "failed otherwise":
        worker.emit(job.id, failed())
    keys = embedded_redis.dbsize()

    with pytest.raises(RequestError, match="can be retried"):
        client.retry(job.id)

    assert embedded_redis.dbsize() == keys


def test_a_job_that_is_not_there_cannot_be_retried(client: Client) -> None:
    with pytest.raises(JobNotFound):
        client.retry("nobody")


def test_a_full_queue_refuses_a_retry_and_changes_nothing(
    client: Client, dead: Job, embedded_redis: redis.Redis
) -> None:
    client.set_limits(model_queued=0)

    with pytest.raises(QueueFull):
        client.retry(dead.id)

    assert embedded_redis.hget(KEYS.job(dead.id), "retried_as") is None


async def test_the_asyncio_client_does_the_same(embedded_server: EmbeddedServer, dead: Job) -> None:
    async with AsyncClient(embedded_server.url) as client:
        listed = await client.dead_jobs()
        job = await client.retry(dead.id)
        again = await client.retry(dead.id)

    assert [each.job_id for each in listed] == [dead.id]
    assert job.id == again.id


def test_the_commands_list_dead_jobs_and_let_one_go_on(
    client: Client, dead: Job, embedded_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMELLA_REDIS_URL", embedded_server.url)
    monkeypatch.setenv("COLUMNS", "200")
    other = client.submit("hello", model=MODEL)
    run = CliRunner().invoke

    listed = run(app, ["jobs", "dead"])
    as_json = json.loads(run(app, ["jobs", "dead", "--json"]).stdout)
    retried = run(app, ["jobs", "retry", dead.id])
    refused = run(app, ["jobs", "retry", other.id])

    assert dead.id in listed.stdout
    assert other.id not in listed.stdout
    assert [job["job_id"] for job in as_json] == [dead.id]
    assert client.job(retried.stdout.strip()).status().state is JobState.QUEUED
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")
    assert retried.stdout.strip() in run(app, ["jobs"]).stdout
