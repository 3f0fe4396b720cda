"""Who should serve a model: the order of workers, the advice, and how both are told."""

from __future__ import annotations

import json

import pytest
import redis
from typer.testing import CliRunner

from lamella.candidates import Standing, rank
from lamella.cli import fleet_models
from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella.errors import NoWorkerError
from lamella.keys import Keys
from lamella.messages import WorkerInfo
from lamella.stored_model import StoredModelInfo
from tests.worker.test_heartbeat import worker_info, write

KEYS = Keys()
GIB = 2**30


def worker(name: str, serves: str = "other", **changes: object) -> WorkerInfo:
    model = {"name": serves, "family": "f", "dtype": "d", "num_layers": 1, "context_length": 1, "size_bytes": 1}
    return worker_info(name=name, host=f"host-{name}", **{"model": model, **changes})


FLEET = [
    worker("far", memory_bytes=8 * GIB),
    worker("near", memory_bytes=4 * GIB, stored=[("wanted", 6 * GIB, GIB)]),
    worker("small", memory_bytes=2 * GIB, stored=[("wanted", 6 * GIB, GIB)]),
    worker("busy", "wanted", running=7),
    worker("idle", "wanted", running=1),
    worker("stopping", "wanted", draining=True),
]


def test_those_that_serve_come_first_then_those_with_the_shards() -> None:
    ranked = rank("wanted", FLEET)

    assert [each.worker for each in ranked] == ["idle", "busy", "near", "far", "small", "stopping"]
    assert ranked[4].standing is Standing.TOO_SMALL


def test_heartbeats_carry_what_a_host_has_stored() -> None:
    info = WorkerInfo.model_validate_json(FLEET[1].model_dump_json(), strict=True)

    assert info.stored == (StoredModelInfo("wanted", 6 * GIB, GIB),)
    assert info.memory_bytes == 4 * GIB


@pytest.mark.parametrize(
    ("fleet", "words"),
    [
        (
            FLEET[:3],
            "Host host-near (of worker near) has the shards of wanted: start a worker there with `lamella worker",
        ),
        (FLEET[:1], "Worker far could take it: `lamella models pull wanted --on far`"),
        ([], "Start one with `lamella worker --model wanted`"),
    ],
)
def test_a_refused_submit_names_the_best_host(
    embedded_server: EmbeddedServer, embedded_redis: redis.Redis, fleet: list[WorkerInfo], words: str
) -> None:
    for each in fleet:
        write(embedded_redis, KEYS, each)

    with Client(embedded_server.url) as client, pytest.raises(NoWorkerError) as caught:
        client.submit("hello", model="wanted")

    assert words in str(caught.value)
    assert "require_worker=False" in str(caught.value)


def test_the_command_shows_workers_and_queues(embedded_server: EmbeddedServer, embedded_redis: redis.Redis) -> None:
    for each in FLEET:
        write(embedded_redis, KEYS, each)
    with Client(embedded_server.url) as client:
        client.submit("hello", model="other", require_worker=False)

    shown = CliRunner().invoke(fleet_models.app, ["where", "wanted", "--redis-url", embedded_server.url])
    told = CliRunner().invoke(fleet_models.app, ["where", "wanted", "--json", "--redis-url", embedded_server.url])
    nobody = CliRunner().invoke(
        fleet_models.app, ["where", "new", "--redis-url", embedded_server.url, "--prefix", "elsewhere:"]
    )

    lines = shown.stdout.splitlines()
    assert lines[0].split()[:3] == ["WORKER", "HOST", "DEVICE"]
    assert [line.split()[0] for line in lines[1:]] == ["idle", "busy", "near", "far", "small", "stopping"]
    workers = json.loads(told.stdout)["workers"]
    assert workers[2]["standing"] == "has_shards"
    assert workers[3]["waiting"] == 1
    assert nobody.stdout == "no worker is running\n"


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["where", "m"], True),
        (["pull", "m", "--on", "w"], True),
        (["pull", "m", "--on=w"], True),
        (["pull", "m"], False),
        (["list"], False),
        ([], False),
    ],
)
def test_only_what_concerns_the_service_is_taken_from_the_engine(arguments: list[str], asked: bool) -> None:
    assert fleet_models.is_asked(arguments) is asked
