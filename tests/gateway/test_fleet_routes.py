"""What the page asks beside the OpenAI API: who one is, workers, queues, jobs; and who may see and change which."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest
import redis

from lamella import Client, Failed, JobState
from lamella.embedded import EmbeddedServer
from lamella.messages import EngineProcessInfo, WorkerInfo
from lamella_gateway.keys_cli import app as keys_app
from tests.client.acting_worker import MODEL, ActingWorker, done, failed, token
from tests.gateway.conftest import MakeKey
from tests.gateway.running_gateway import RunningGateway
from tests.waiting import wait_until

DEAD = Failed(code="attempts_exhausted", message="3 attempts were used up")
Answer = tuple[int, Any]


def call(gateway: RunningGateway, path: str, key: str | None = None, method: str = "GET") -> Answer:
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=40)
    connection.request(method, path, headers={} if key is None else {"Authorization": f"Bearer {key}"})
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def submit(server: EmbeddedServer, user: str, model: str = MODEL, **options: Any) -> str:
    with Client(server.url) as client:
        return client.submit("a secret prompt", model=model, user=user, require_worker=False, **options).id


def ids(answer: Answer) -> list[str]:
    return [job["id"] for job in answer[1]["data"]]


def kill(worker: ActingWorker, job_id: str) -> None:
    worker.claim(job_id)
    worker.emit(job_id, token("a"), DEAD)


def announce(worker: ActingWorker, **changes: object) -> WorkerInfo:
    info = worker.announce().model_copy(update=changes)
    worker.redis.set(worker.keys.worker(worker.name), info.model_dump_json(), ex=600)
    return info


def test_a_key_sees_and_changes_its_own_users_jobs_only(
    guarded: RunningGateway, worker: ActingWorker, embedded_server: EmbeddedServer, new_key: MakeKey
) -> None:
    ada, bob = new_key("ada"), new_key("bob")
    hers, his = submit(embedded_server, "ada"), submit(embedded_server, "bob")

    seen = ids(call(guarded, "/lamella/jobs", ada))
    others = [
        call(guarded, f"/lamella/jobs/{his}", ada),
        call(guarded, f"/lamella/jobs/{his}/cancel", ada, "POST"),
        call(guarded, f"/lamella/jobs/{his}/retry", ada, "POST"),
        call(guarded, "/lamella/jobs/nothing", ada),
    ]
    own = call(guarded, f"/lamella/jobs/{hers}/cancel", ada, "POST")

    assert seen == [hers]
    assert {(status, body["error"]["code"]) for status, body in others} == {(404, "job_not_found")}
    assert (own[0], own[1]["state"]) == (200, "cancelled")
    assert call(guarded, f"/lamella/jobs/{his}", bob)[1]["state"] == "queued"


def test_an_administrators_key_sees_and_cancels_everybodys_jobs(
    guarded: RunningGateway, worker: ActingWorker, embedded_server: EmbeddedServer, new_key: MakeKey
) -> None:
    admin = new_key("root", is_admin=True)
    hers, his = submit(embedded_server, "ada"), submit(embedded_server, "bob")
    worker.claim(his)

    seen = ids(call(guarded, "/lamella/jobs", admin))
    cancelled = call(guarded, f"/lamella/jobs/{his}/cancel", admin, "POST")

    assert sorted(seen) == sorted([hers, his])
    assert (cancelled[1]["state"], cancelled[1]["cancel_requested"]) == ("running", True)


@pytest.mark.parametrize("path", ["account", "workers", "queues", "jobs", "jobs/x"])
def test_nothing_is_told_without_a_key(guarded: RunningGateway, path: str) -> None:
    assert [call(guarded, f"/lamella/{path}", key)[0] for key in (None, "nonsense")] == [401, 401]


def test_workers_are_for_administrators(guarded: RunningGateway, worker: ActingWorker, new_key: MakeKey) -> None:
    refused = call(guarded, "/lamella/workers", new_key("ada"))
    told = call(guarded, "/lamella/workers", new_key("root", is_admin=True))

    assert (refused[0], refused[1]["error"]["code"]) == (403, "admin_required")
    assert [each["name"] for each in told[1]["data"]] == ["acting"]


def test_a_key_restricted_to_other_endpoints_lists_no_jobs(guarded: RunningGateway, new_key: MakeKey) -> None:
    chat, jobs = new_key("ada", endpoints=("chat",)), new_key("ada", endpoints=("jobs",))

    found = [
        (call(guarded, "/lamella/jobs", key)[0], call(guarded, "/lamella/account", key)[1]) for key in (chat, jobs)
    ]

    assert [(status, account["sees_jobs"]) for status, account in found] == [(403, False), (200, True)]
    assert [account["is_admin"] for _, account in found] == [False, False]


def test_without_keys_everything_is_seen(
    gateway: RunningGateway, worker: ActingWorker, embedded_server: EmbeddedServer
) -> None:
    job_id = submit(embedded_server, "ada")

    account = call(gateway, "/lamella/account")[1]

    assert (account["user"], account["is_admin"], account["sees_jobs"]) == (None, True, True)
    assert ids(call(gateway, "/lamella/jobs")) == [job_id]
    assert len(call(gateway, "/lamella/workers")[1]["data"]) == 1


def test_a_worker_tells_what_of_its_model_lies_where(gateway: RunningGateway, worker: ActingWorker) -> None:
    before = call(gateway, "/lamella/workers")[1]["data"][0]
    announce(worker, sweeps=10, tier_bytes=(3000, 2000, 5000), running=2, last_sweep_at=1.0)
    stuck = call(gateway, "/lamella/workers")[1]["data"][0]
    process = EngineProcessInfo(pid=1, state="starting", restarts=2, max_sequences=4, trouble="it was killed")
    announce(worker, engine_process=process)
    starting = call(gateway, "/lamella/workers")[1]["data"][0]

    assert (before["state"], before["plan"]) == ("idle", None)
    assert stuck["plan"] == {"disk": 300, "ram": 200, "vram": 500}
    assert stuck["state"] == "stuck"
    assert (starting["state"], starting["engine"]["trouble"]) == ("starting", "it was killed")
    assert [(model["name"], model["slots"]) for model in before["models"]] == [(MODEL, 4)]


def test_queues_tell_what_waits_of_the_models_a_key_may_use(
    guarded: RunningGateway, worker: ActingWorker, embedded_server: EmbeddedServer, new_key: MakeKey
) -> None:
    for _ in range(7):
        submit(embedded_server, "ada")
    submit(embedded_server, "ada", "other/model")

    everything = call(guarded, "/lamella/queues", new_key("bob"))[1]["data"]
    restricted = call(guarded, "/lamella/queues", new_key("bob", models=(MODEL,)))[1]["data"]

    assert [(q["model"], q["workers"], q["slots"], q["waiting"], q["in_flight"]) for q in everything] == [
        ("other/model", 0, 0, 1, 0),
        (MODEL, 1, 4, 2, 5),
    ]
    assert all(0 <= queue["oldest_s"] < 600 for queue in everything)
    assert [queue["model"] for queue in restricted] == [MODEL]


def test_jobs_are_listed_newest_first_by_state_and_no_more_than_asked(
    gateway: RunningGateway, worker: ActingWorker, embedded_server: EmbeddedServer
) -> None:
    made = [submit(embedded_server, "ada") for _ in range(4)]
    worker.run(made[1], "a", "b")
    worker.claim(made[2])
    worker.emit(made[2], failed())

    found = {state: ids(call(gateway, f"/lamella/jobs?state={state}")) for state in JobState}
    newest = ids(call(gateway, "/lamella/jobs?limit=2"))
    ended = {job["id"]: job for job in call(gateway, "/lamella/jobs")[1]["data"]}

    assert found == {
        "queued": [made[3], made[0]],
        "running": [],
        "done": [made[1]],
        "failed": [made[2]],
        "cancelled": [],
    }
    assert newest == [made[3], made[2]]
    assert (ended[made[1]]["completion_tokens"], ended[made[1]]["finish_reason"]) == (2, "stop")
    assert (ended[made[2]]["error"]["code"], ended[made[2]]["can_retry"]) == ("prompt_too_long", False)
    assert "secret" not in json.dumps(ended)


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "limit=-1", "state=dead", "user=bob"])
def test_what_cannot_be_listed_is_refused_by_name(gateway: RunningGateway, query: str) -> None:
    status, body = call(gateway, f"/lamella/jobs?{query}")

    assert (status, body["error"]["param"]) == (400, query.partition("=")[0])


def test_a_waiting_job_tells_its_place(
    gateway: RunningGateway, worker: ActingWorker, embedded_server: EmbeddedServer
) -> None:
    made = [submit(embedded_server, "ada") for _ in range(8)]

    job = call(gateway, f"/lamella/jobs/{made[-1]}")[1]

    assert (job["state"], job["position"]) == ("queued", 2)  # five were sent to the worker already


def test_a_dead_job_goes_on_once_and_its_key_pays_for_it(
    guarded: RunningGateway,
    worker: ActingWorker,
    embedded_server: EmbeddedServer,
    embedded_redis: redis.Redis,
    new_key: MakeKey,
) -> None:
    ada = new_key("ada", tokens_per_day=1000)
    dead = submit(embedded_server, "ada", max_tokens=100)
    kill(worker, dead)

    first, again = (call(guarded, f"/lamella/jobs/{dead}/retry", ada, "POST") for _ in range(2))
    worker.claim(first[1]["id"])
    worker.emit(first[1]["id"], token("b"), done(2))

    assert (first[0], first[1]["id"]) == (200, again[1]["id"])
    assert first[1]["id"] != dead
    today = next(iter(embedded_redis.scan_iter("lamella:apiday:*")))
    wait_until(lambda: embedded_redis.get(today) == "5")  # three of the prompt, two of the answer


def test_a_retry_that_a_key_cannot_pay_makes_no_job(
    guarded: RunningGateway, worker: ActingWorker, embedded_server: EmbeddedServer, new_key: MakeKey
) -> None:
    dead = submit(embedded_server, "ada", max_tokens=100)
    kill(worker, dead)

    status, body = call(guarded, f"/lamella/jobs/{dead}/retry", new_key("ada", tokens_per_day=50), "POST")

    assert (status, body["error"]["code"]) == (429, "insufficient_quota")
    with Client(embedded_server.url) as client:
        assert [job.job_id for job in client.jobs()] == [dead]


def test_a_job_that_is_not_dead_is_not_retried_and_costs_nothing(
    guarded: RunningGateway,
    worker: ActingWorker,
    embedded_server: EmbeddedServer,
    embedded_redis: redis.Redis,
    new_key: MakeKey,
) -> None:
    job_id = submit(embedded_server, "ada")

    status, body = call(guarded, f"/lamella/jobs/{job_id}/retry", new_key("ada", tokens_per_day=1000), "POST")

    assert (status, "retried" in body["error"]["message"]) == (400, True)
    assert [embedded_redis.get(day) for day in embedded_redis.scan_iter("lamella:apiday:*")] == ["0"]


def test_a_record_of_another_version_is_left_out(
    gateway: RunningGateway, worker: ActingWorker, embedded_server: EmbeddedServer, embedded_redis: redis.Redis
) -> None:
    good, other = submit(embedded_server, "ada"), submit(embedded_server, "ada")
    embedded_redis.hset(worker.keys.job(other), "v", "99")

    assert ids(call(gateway, "/lamella/jobs")) == [good]


def test_administrators_keys_are_made_on_the_command_line(embedded_server: EmbeddedServer) -> None:
    from typer.testing import CliRunner

    place = ["--redis-url", embedded_server.url]
    CliRunner().invoke(keys_app, ["create", "ops", "--admin", *place])
    CliRunner().invoke(keys_app, ["create", "plain", *place])

    listed = json.loads(CliRunner().invoke(keys_app, ["list", "--json", *place]).stdout)

    assert {key["name"]: key["is_admin"] for key in listed} == {"ops": True, "plain": False}
