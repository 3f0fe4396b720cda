"""While nothing comes: connections are kept alive; when nobody waits any more, jobs are cancelled."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest

from lamella.embedded import EmbeddedServer
from tests.client.acting_worker import MODEL, ActingWorker, done, failed, token
from tests.gateway.running_gateway import KEEP_ALIVE, RunningGateway, on_next_job
from tests.waiting import wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
SILENCE_S = 2.5
TICK_S = 0.5


@pytest.fixture
def gateway(embedded_server: EmbeddedServer) -> Iterator[RunningGateway]:
    """A gateway that gives a sign of life twice a second."""
    with RunningGateway(embedded_server.url, keep_alive_s=TICK_S) as gateway:
        yield gateway


@contextmanager
def posted(gateway: RunningGateway, body: dict, path: str = "/v1/chat/completions", **headers: str) -> Iterator:
    """A connection on which a request was sent, whose answer has not been read."""
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=40)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **given})
    yield connection
    connection.close()


def pause(seconds: float) -> None:
    """Let time pass."""
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end)


def slowly(worker: ActingWorker, *events) -> object:
    def act(job_id: str) -> None:
        pause(SILENCE_S)
        worker.emit(job_id, *events)

    return on_next_job(worker, act)


def test_a_silent_stream_brings_comments(gateway: RunningGateway, worker: ActingWorker) -> None:
    thread = slowly(worker, token("Paris"), done())
    with posted(gateway, {**CHAT, "stream": True}) as connection:
        body = connection.getresponse().read()
    thread.join(40)

    assert body.startswith(b"data: ")
    assert b'"role": "assistant"' in body.split(b"\n\n")[0]
    assert 2 <= body.count(KEEP_ALIVE) <= SILENCE_S / TICK_S
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_silent_whole_answer_brings_spaces(gateway: RunningGateway, worker: ActingWorker) -> None:
    thread = slowly(worker, token("Paris"), done())
    with posted(gateway, CHAT) as connection:
        response = connection.getresponse()
        body = response.read()
    thread.join(40)

    assert response.status == 200
    assert 1 <= len(body) - len(body.lstrip(b" ")) <= SILENCE_S / TICK_S
    assert json.loads(body)["choices"][0]["message"]["content"] == "Paris"


def test_the_sdk_outlives_a_silence_longer_than_its_timeout(gateway: RunningGateway, worker: ActingWorker) -> None:
    thread = slowly(worker, token("Paris"), done())
    with gateway.client(timeout=SILENCE_S - TICK_S / 2) as sdk:
        answer = sdk.chat.completions.create(**CHAT)
    thread.join(40)

    assert answer.choices[0].message.content == "Paris"


def test_a_failure_after_the_first_second_is_told_in_the_body(gateway: RunningGateway, worker: ActingWorker) -> None:
    thread = slowly(worker, failed())
    with posted(gateway, CHAT) as connection:
        body = connection.getresponse().read()
    thread.join(40)

    assert json.loads(body)["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_cancels_its_jobs(gateway: RunningGateway, worker: ActingWorker, is_stream: bool) -> None:
    with posted(gateway, {**CHAT, "stream": is_stream, "n": 2}):
        ids = wait_until(lambda: len(found := worker.redis.zrange(worker.keys.active, 0, -1)) == 2 and found)
        worker.claim(ids[0])
        worker.emit(ids[0], token("Par"))

    wait_until(lambda: worker.redis.hget(worker.keys.job(ids[1]), "state") == "cancelled")
    wait_until(lambda: worker.emit(ids[0], token("is")).cancel_requested)


def test_a_client_that_leaves_a_background_response_leaves_it_running(
    gateway: RunningGateway, worker: ActingWorker
) -> None:
    body = {"model": MODEL, "input": "Hi", "background": True, "stream": True}
    with posted(gateway, body, "/v1/responses") as connection:
        assert connection.getresponse().readline().startswith(b"event: response.created")
        (job_id,) = worker.redis.zrange(worker.keys.active, 0, -1)

    wait_until(lambda: gateway.server.config.app.state.service.metrics.disconnects._value.get() == 1)
    assert worker.redis.hget(worker.keys.job(job_id), "state") == "queued"
    with gateway.client() as sdk:
        assert sdk.responses.retrieve(f"resp_{job_id}").status == "queued"


def test_a_gateway_that_stops_leaves_its_jobs_to_be_found_again(
    embedded_server: EmbeddedServer, worker: ActingWorker
) -> None:
    with RunningGateway(embedded_server.url) as gateway, posted(gateway, CHAT):
        (job_id,) = wait_until(lambda: worker.redis.zrange(worker.keys.active, 0, -1))
        gateway.server.should_exit = True
        wait_until(lambda: not gateway._thread.is_alive())

    assert worker.redis.hget(worker.keys.job(job_id), "state") == "queued"
    assert worker.redis.hget(worker.keys.job(job_id), "cancel") is None


def test_an_answer_that_takes_too_long_is_ended_with_its_job(
    embedded_server: EmbeddedServer, worker: ActingWorker
) -> None:
    with RunningGateway(embedded_server.url, max_request_s=1.5, keep_alive_s=0.2) as gateway, gateway.client() as sdk:
        stream = sdk.chat.completions.create(**CHAT, stream=True)
        assert next(stream).choices[0].delta.content == ""
        with pytest.raises(openai.APIError, match=r"longer than 1.5 s"):
            next(stream)
        (job_id,) = worker.redis.zrange(worker.keys.jobs, 0, -1)
        wait_until(lambda: worker.redis.hget(worker.keys.job(job_id), "state") == "cancelled")


def test_no_more_streams_are_open_than_may_be(embedded_server: EmbeddedServer, worker: ActingWorker) -> None:
    with RunningGateway(embedded_server.url, max_open_streams=1) as gateway, gateway.client() as sdk:
        with posted(gateway, {**CHAT, "stream": True}):
            wait_until(lambda: worker.redis.zcard(worker.keys.active))
            with pytest.raises(openai.InternalServerError) as caught:
                sdk.chat.completions.create(**CHAT)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "2"

        wait_until(lambda: worker.redis.zcard(worker.keys.active) == 0)
        thread = on_next_job(worker, lambda job_id: worker.emit(job_id, token("Paris"), done()))
        assert sdk.chat.completions.create(**CHAT).choices[0].message.content == "Paris"
        thread.join(40)
