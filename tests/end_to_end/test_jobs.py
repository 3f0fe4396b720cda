"""Jobs through the whole path: client, server, worker process, engine, and back."""

from __future__ import annotations

import time

import pytest

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella.errors import JobCancelled, JobFailed
from lamella.messages import Cancelled, Done, JobState, TokenEvent, WorkerInfo
from tests.waiting import wait_until

LONG = 450  # tokens: most of the tiny model's context


def heartbeat_from_now(client: Client, model: str) -> WorkerInfo:
    """What the only worker of a model says of itself from now on."""
    now = time.time()
    return wait_until(lambda: [w for w in client.workers() if w.model.name == model and w.heartbeat_at > now])[0]


def test_a_stream_brings_the_same_text_as_waiting_for_it(client: Client, solo: str) -> None:
    job = client.submit("The river runs", model=solo, max_tokens=40, ignore_eos=True)

    items = [item for item in job.stream(timeout_s=30) if item.seq is not None]

    assert [item.seq for item in items] == list(range(1, len(items) + 1))
    assert isinstance(items[-1].event, Done)
    assert items[-1].event.usage.completion_tokens == 40
    tokens = [item.event for item in items if isinstance(item.event, TokenEvent)]
    completion = client.generate("The river runs", model=solo, max_tokens=40, ignore_eos=True, timeout_s=30)
    assert "".join(event.text for event in tokens) == completion.text != ""
    assert sum(len(event.token_ids) for event in tokens) == 40


def test_a_chat_is_answered_and_its_usage_counted(client: Client, solo: str) -> None:
    messages = [{"role": "user", "content": "Which is the capital of France?"}]

    completion = client.generate(messages=messages, model=solo, max_tokens=8, ignore_eos=True, timeout_s=30)

    assert completion.finish_reason == "length"
    assert completion.usage.completion_tokens == 8
    assert completion.usage.prompt_tokens > 5
    assert completion.usage.sweeps >= 8
    assert completion.usage.streamed_bytes > 0


def test_a_seed_draws_the_same_tokens_again(client: Client, solo: str) -> None:
    texts = [
        client.generate(
            "One, two", model=solo, max_tokens=30, temperature=1.0, seed=seed, ignore_eos=True, timeout_s=30
        ).text
        for seed in (1, 1, 2)
    ]

    assert texts[0] == texts[1] != texts[2]


def test_cancel_ends_the_job_at_the_sweep_boundary_and_frees_the_slot(client: Client, solo: str) -> None:
    job = client.submit("A small lamp", model=solo, max_tokens=LONG, ignore_eos=True)
    stream = job.stream(timeout_s=30)
    next(stream)

    job.cancel()

    *_, last = stream
    assert isinstance(last.event, Cancelled)
    assert last.seq is not None
    assert last.seq < LONG
    assert job.status().state is JobState.CANCELLED
    with pytest.raises(JobCancelled):
        job.result(timeout_s=40)
    wait_until(lambda: [worker.running for worker in client.workers() if worker.model.name == solo] == [0])


def test_the_same_request_under_the_same_key_is_one_job(client: Client, solo: str) -> None:
    jobs = [
        client.submit("Every layer", model=solo, max_tokens=10, ignore_eos=True, idempotency_key="once")
        for _ in range(3)
    ]

    texts = [job.result(timeout_s=30).text for job in jobs]

    assert len({job.id for job in jobs}) == 1
    assert len(set(texts)) == 1
    assert jobs[0].status().attempts == 1


def test_a_client_that_comes_back_reads_on_where_it_was(
    client: Client, solo: str, session_server: EmbeddedServer
) -> None:
    job = client.submit("In the morning", model=solo, max_tokens=LONG, ignore_eos=True)
    before = []
    for item in job.stream(timeout_s=30):
        before.append(item)
        if item.seq == 20:
            break

    with Client(session_server.url) as other:
        after = list(other.job(job.id).stream(after=20, timeout_s=30))

    seqs = [item.seq for item in (*before, *after) if item.seq is not None]
    assert seqs == list(range(1, LONG + 2))
    assert isinstance(after[-1].event, Done)
    events = [item.event for item in (*before, *after) if isinstance(item.event, TokenEvent)]
    assert "".join(event.text for event in events) == job.result(timeout_s=40).text


def test_a_prompt_longer_than_the_context_fails_and_says_so(client: Client, solo: str) -> None:
    job = client.submit("river " * 2000, model=solo, max_tokens=5)

    with pytest.raises(JobFailed) as caught:
        job.result(timeout_s=30)

    assert caught.value.code == "prompt_too_long"
    assert "512" in caught.value.message


def test_eight_jobs_share_sweeps_and_each_gets_its_own_text(client: Client, solo: str) -> None:
    prompts = [f"{number} small lamps stood" for number in range(8)]
    alone = [client.generate(p, model=solo, max_tokens=60, ignore_eos=True, timeout_s=30).text for p in prompts]
    before = heartbeat_from_now(client, solo)

    jobs = [client.submit(prompt, model=solo, max_tokens=60, ignore_eos=True) for prompt in prompts]
    together = [job.result(timeout_s=30) for job in jobs]

    assert [completion.text for completion in together] == alone
    after = heartbeat_from_now(client, solo)
    assert after.sweeps - before.sweeps < 8 * 60 / 3
