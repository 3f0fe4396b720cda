"""What a program does with the client, on a real server."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import redis

from lamella import Client, operations
from lamella import keys as wire_keys
from lamella.embedded import EmbeddedServer
from lamella.errors import (
    ConfigError,
    IdempotencyConflict,
    JobCancelled,
    JobFailed,
    JobNotFound,
    LamellaError,
    NoWorkerError,
    QueueFull,
    RequestError,
    ServerRefused,
    ServerUnreachable,
)
from lamella.keys import Keys
from lamella.messages import JobState, TokenLogprob, decode_request
from lamella.registry_calls import CancelStatus
from lamella.request_draft import draft_request
from lamella.script_call import ScriptCall, ScriptName
from tests.client.acting_worker import MODEL, ActingWorker, done, failed, token
from tests.client.lossy_proxy import LossyProxy
from tests.waiting import wait_until

KEYS = Keys()


def in_background(work: threading.Thread) -> threading.Thread:
    work.start()
    return work


def test_a_job_runs_from_submit_to_result(client: Client, worker: ActingWorker) -> None:
    job = client.submit("hello", max_tokens=3)
    assert job.status().state is JobState.QUEUED

    worker.run(job.id, "Par", "is")
    result = job.result(timeout_s=40)

    assert (result.text, result.token_ids, result.finish_reason) == ("Paris", (1, 1), "stop")
    assert result.usage.completion_tokens == 2
    assert "".join(job.text_stream(timeout_s=40)) == "Paris"
    status = job.status()
    assert (status.state, status.worker, status.attempts, status.events) == (JobState.DONE, "acting", 1, 3)


def test_generate_waits_for_the_whole(client: Client, worker: ActingWorker) -> None:
    def serve() -> None:
        assert wait_until(lambda: worker.redis.rpop(KEYS.queue_list(MODEL)))
        worker.run(worker.redis.zrange(KEYS.active, 0, 0)[0], "a", "b")

    thread = in_background(threading.Thread(target=serve, name="serve"))

    assert client.generate("x", timeout_s=40).text == "ab"
    thread.join(40)


def test_stream_submits_at_once(client: Client, worker: ActingWorker) -> None:
    items = client.stream("x", timeout_s=40)
    worker.run(client.jobs()[0].job_id, "a")

    assert [seq for seq, _ in items] == [1, 2]


def test_logprobs_are_gathered(client: Client, worker: ActingWorker) -> None:
    job = client.submit("x", logprobs=0)
    worker.claim(job.id)
    logprob = TokenLogprob(token_id=1, logprob=-0.5)
    worker.emit(job.id, token("a").model_copy(update={"logprobs": (logprob,)}), done())

    assert job.result(timeout_s=40).logprobs == (logprob,)


def test_a_drawn_seed_is_in_the_request(client: Client, worker: ActingWorker) -> None:
    job = client.submit("x", temperature=0.8)

    assert decode_request(worker.claim(job.id).request_json).sampling.seed is not None


def test_a_failed_job_raises_its_reason(client: Client, worker: ActingWorker) -> None:
    job = client.submit("x")
    worker.claim(job.id)
    worker.emit(job.id, failed())

    with pytest.raises(JobFailed, match="shorten it") as caught:
        job.result(timeout_s=40)
    assert (caught.value.code, caught.value.job_id) == ("prompt_too_long", job.id)


def test_cancelling_a_waiting_job_ends_it(client: Client, worker: ActingWorker) -> None:
    job = client.submit("x")

    assert job.cancel() is CancelStatus.CANCELLED
    assert client.cancel(job.id) is CancelStatus.CANCELLED
    with pytest.raises(JobCancelled):
        job.result(timeout_s=40)


def test_cancelling_a_running_job_asks_its_worker(client: Client, worker: ActingWorker) -> None:
    job = client.submit("x")
    worker.claim(job.id)

    assert job.cancel() is CancelStatus.REQUESTED
    assert job.status().cancel_requested


@pytest.mark.parametrize("job_id", ["nobody", "", "../x", "a\nb", "\ud800", "x" * 300])
def test_an_unknown_job_is_not_found(client: Client, job_id: str) -> None:
    with pytest.raises(JobNotFound):
        client.status(job_id)
    with pytest.raises(JobNotFound):
        client.cancel(job_id)


def test_a_job_id_that_is_no_text_is_refused(client: Client) -> None:
    with pytest.raises(RequestError, match="not int"):
        client.job(5)  # type: ignore[arg-type]  # the mistake under test


def test_the_only_served_model_is_the_default(client: Client, worker: ActingWorker) -> None:
    assert client.submit("x").status().model == MODEL


def test_with_several_models_one_must_be_named(client: Client, worker: ActingWorker) -> None:
    ActingWorker(worker.redis, "second", model="other").announce()

    with pytest.raises(RequestError, match=f"other, {MODEL}"):
        client.submit("x")


def test_a_model_nobody_serves_is_refused_with_what_is_served(client: Client, worker: ActingWorker) -> None:
    with pytest.raises(NoWorkerError, match=MODEL) as caught:
        client.submit("x", model="other/model")

    assert caught.value.served == (MODEL,)
    assert client.jobs() == []


def test_a_draining_worker_serves_nothing(client: Client, worker: ActingWorker) -> None:
    worker.announce(draining=True)

    assert client.models() == []
    assert [found.name for found in client.workers()] == ["acting"]
    with pytest.raises(NoWorkerError):
        client.submit("x", model=MODEL)


def test_a_job_may_wait_for_a_worker_to_come(client: Client) -> None:
    job = client.submit("x", model="later", require_worker=False)

    assert job.status().state is JobState.QUEUED


def test_the_same_key_and_request_is_the_same_job(client: Client, worker: ActingWorker) -> None:
    first = client.submit("x", temperature=1.0, idempotency_key="k")

    assert client.submit("x", temperature=1.0, idempotency_key="k").id == first.id
    assert worker.redis.llen(KEYS.queue_list(MODEL)) == 1


def test_the_same_key_finds_its_job_even_without_a_worker(client: Client, worker: ActingWorker) -> None:
    first = client.submit("x", idempotency_key="k")
    worker.redis.delete(KEYS.worker("acting"))

    assert client.submit("x", idempotency_key="k").id == first.id


def test_the_same_key_with_another_request_conflicts(client: Client, worker: ActingWorker) -> None:
    first = client.submit("x", idempotency_key="k")

    with pytest.raises(IdempotencyConflict, match=first.id):
        client.submit("y", idempotency_key="k")


def test_submits_with_one_key_at_once_make_one_job(embedded_server: EmbeddedServer, worker: ActingWorker) -> None:
    ids: list[str] = []

    def submit() -> None:
        with Client(embedded_server.url) as own:
            ids.append(own.submit("x", idempotency_key="k").id)

    threads = [in_background(threading.Thread(target=submit, name=f"submit-{n}")) for n in range(8)]
    for thread in threads:
        thread.join(40)

    assert len(ids) == 8
    assert len(set(ids)) == 1


def test_a_lost_answer_is_asked_for_again_and_makes_one_job(
    client: Client, embedded_server: EmbeddedServer, worker: ActingWorker, tmp_path: Path
) -> None:
    client.submit("first")  # so that the server knows the script
    with LossyProxy(embedded_server.socket_path, tmp_path) as proxy, Client(proxy.url) as behind:
        proxy.lose_next_answer_to("EVALSHA")

        job = behind.submit("second")

        assert proxy.lost == 1
        assert job.status().state is JobState.QUEUED
    assert len(client.jobs()) == 2
    assert worker.redis.llen(KEYS.queue_list(MODEL)) == 2


def test_a_full_queue_is_said(client: Client, worker: ActingWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_keys, "MAX_QUEUED", 1)
    worker.redis.delete(KEYS.capacity(MODEL))
    client.submit("x")

    with pytest.raises(QueueFull, match="holds 1 jobs"):
        client.submit("y")


def test_jobs_come_newest_first_and_skip_what_expired(client: Client, worker: ActingWorker) -> None:
    ids = [client.submit(text).id for text in "abc"]
    worker.redis.zadd(KEYS.jobs, dict(zip(ids, (1, 2, 3), strict=True)))
    worker.redis.delete(KEYS.job(ids[1]))

    assert [job.job_id for job in client.jobs()] == [ids[2], ids[0]]
    assert len(client.jobs(limit=1)) == 1


@pytest.mark.parametrize("limit", [0, -1, 1001, "5", True])
def test_a_listing_has_a_bound(client: Client, limit: int) -> None:
    with pytest.raises(RequestError, match="limit is"):
        client.jobs(limit)


def test_a_closed_client_says_so(embedded_server: EmbeddedServer) -> None:
    client = Client(embedded_server.url)
    client.close()
    client.close()

    with pytest.raises(LamellaError, match="closed"):
        client.jobs()
    with pytest.raises(LamellaError, match="closed"):
        list(client.job("j").stream(timeout_s=1))


def test_an_absent_server_is_unreachable_at_submit(tmp_path: Path) -> None:
    with Client(f"unix://{tmp_path}/none.sock", timeout_s=1.0) as client:
        started = time.monotonic()
        with pytest.raises(ServerUnreachable, match="lamella up"):
            client.submit("x", model="m")

    assert time.monotonic() - started < 20.0


def test_a_full_server_refuses_and_stores_nothing(own_server: EmbeddedServer) -> None:
    with Client(own_server.url) as client, redis.Redis.from_url(own_server.url, protocol=2) as link:
        link.config_set("maxmemory", "1mb")

        with pytest.raises(ServerRefused, match="memory is full"):
            client.submit("x", model="m", require_worker=False)

        assert client.jobs() == []


def test_a_password_never_shows(own_server: EmbeddedServer) -> None:
    url = own_server.url + "&password=geheim"
    with redis.Redis.from_url(own_server.url, protocol=2) as link:
        link.config_set("requirepass", "other")

    with Client(url) as client, pytest.raises(ServerRefused) as caught:
        client.jobs()
    with Client(own_server.url) as client, pytest.raises(ServerRefused, match="asks for a password"):
        client.jobs()

    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"heal_s": -1}, {"timeout_s": None}])
def test_time_spans_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="every wait has an end"):
        Client("redis://127.0.0.1:1/0", **options)  # type: ignore[arg-type]  # the mistake under test


def test_an_unusable_url_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="redis://"):
        Client("http://localhost")


def test_a_record_of_a_newer_version_does_not_hide_the_others(
    client: Client, worker: ActingWorker, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = client.submit("a").id, client.submit("b").id
    worker.redis.hset(KEYS.job(new), "v", 99)

    assert [job.job_id for job in client.jobs()] == [old]
    assert new in caplog.text


def test_a_submit_that_names_its_model_is_one_exchange() -> None:
    steps = operations.submit(KEYS, draft_request("x", {"model": "m"}))

    call = next(steps)
    with pytest.raises(StopIteration) as end:
        steps.send(["created", "job-1", 1, 0, 0, 0])

    assert isinstance(call, ScriptCall)
    assert call.script is ScriptName.SUBMIT
    assert end.value.value == "job-1"


def test_operations_ask_for_no_more_workers_than_needed() -> None:
    steps = operations.workers(KEYS)

    assert next(steps)
    with pytest.raises(StopIteration) as end:
        steps.send([[]])
    assert end.value.value == []
