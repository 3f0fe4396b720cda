"""A worker that is asked to bring a model: what it takes, what it tells, and what the one who asked is told."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner, Result

from lamella import pulls
from lamella.cli import fleet_models
from lamella.connection import Connection, Privacy
from lamella.embedded import EmbeddedServer
from lamella.errors import ConfigError, RequestError
from lamella.keys import PULLS_ASKED, Keys
from lamella.pull_messages import PullState, PullStatus
from lamella_engine import ShardStore
from lamella_engine.peer_server import PeerServer
from lamella_worker.config import EngineTable
from lamella_worker.pull_keeper import PullKeeper
from lamella_worker.pull_process import PullProcess
from tests.waiting import wait_until
from tests.worker.test_heartbeat import worker_info, write

KEYS = Keys()
SCRIPT = """
import sys, json, time
order = json.loads(sys.stdin.readline())
def say(**report): print(json.dumps(report), flush=True)
say(kind="progress", phase="fetch", done_bytes=10, total_bytes=40)
name = order["models"][0]["opened_as"]
if name.startswith("fails"):
    say(kind="refused", message="no room for " + name, is_out_of_memory=False); sys.exit(1)
if name.startswith("dies"):
    sys.exit(3)
if name.startswith("slow"):
    sys.stdin.read(); sys.exit(1)
say(kind="progress", phase="fetch", done_bytes=40, total_bytes=40)
"""


class Started:
    """Starts scripted processes, and knows which."""

    def __init__(self) -> None:
        self.models: list[str] = []
        self.processes: list[PullProcess] = []

    def __call__(self, model: str, engine: EngineTable) -> PullProcess:
        self.models.append(model)
        self.processes.append(PullProcess(model, engine, (sys.executable, "-c", SCRIPT)))
        return self.processes[-1]


def admitted(model: str) -> str:
    if model == "forbidden":
        raise ConfigError("security.allowed_models allows owner/*")
    return model


@pytest.fixture
def connection(embedded_server: EmbeddedServer) -> Iterator[Connection]:
    opened = Connection(embedded_server.url, KEYS.prefix, 20.0, Privacy(None, None))
    yield opened
    opened.close()


@pytest.fixture
def started() -> Started:
    return Started()


@pytest.fixture
def keeper(embedded_redis: redis.Redis, started: Started) -> Iterator[PullKeeper]:
    """The pulls of worker `w1`, which is alive."""
    write(embedded_redis, KEYS, worker_info(name="w1"))
    running = PullKeeper(embedded_redis, KEYS, "w1", EngineTable(), admitted, start=started)
    running.start()
    yield running
    running.stop(40)


def ask(connection: Connection, model: str, worker: str = "w1") -> str:
    return connection.run(pulls.ask(KEYS, worker, model, serve=True))


def status(connection: Connection, model: str, ask_id: str) -> PullStatus | None:
    return connection.run(pulls.look(KEYS, "w1", model, ask_id)).status


def ended(connection: Connection, model: str, ask_id: str) -> PullStatus:
    def final() -> PullStatus | None:
        found = status(connection, model, ask_id)
        return found if found is not None and found.state.is_final else None

    found = wait_until(final)
    assert found is not None
    return found


def run(server: EmbeddedServer, *arguments: str) -> Result:
    return CliRunner().invoke(fleet_models.app, [*arguments, "--redis-url", server.url])


def test_a_model_is_brought_and_told_how_to_serve(keeper: PullKeeper, connection: Connection) -> None:
    found = ended(connection, "good", ask(connection, "good"))

    assert found.state is PullState.DONE
    assert (found.done_bytes, found.total_bytes) == (40, 40)
    assert "the shards of good are on the host of worker w1" in found.message
    assert "`lamella worker --model good`" in found.message


@pytest.mark.parametrize(
    ("model", "words"),
    [("fails", "no room for fails"), ("dies", "ended with code 3"), ("forbidden", "allowed_models allows owner/*")],
)
def test_what_goes_wrong_is_told(keeper: PullKeeper, connection: Connection, model: str, words: str) -> None:
    found = ended(connection, model, ask(connection, model))

    assert found.state is PullState.FAILED
    assert words in found.message


def test_who_asks_for_what_is_under_way_follows_it(
    keeper: PullKeeper, connection: Connection, started: Started
) -> None:
    first = ask(connection, "slow")
    wait_until(lambda: status(connection, "slow", first))
    second, other = ask(connection, "slow"), ask(connection, "good")

    joined = wait_until(lambda: status(connection, "slow", second))
    waits = wait_until(lambda: status(connection, "good", other))

    assert joined is not None
    assert joined.state is PullState.RUNNING
    assert (joined.phase, joined.done_bytes) == ("fetch", 10)
    assert waits is not None
    assert waits.state is PullState.WAITING
    assert "waits for slow" in waits.message
    assert started.models == ["slow"]
    keeper.stop(40)
    stopped = ended(connection, "slow", second)
    assert "the worker was stopped" in stopped.message
    assert "the worker was stopped" in ended(connection, "good", other).message


def test_only_so_many_wait(keeper: PullKeeper, connection: Connection) -> None:
    asks = [ask(connection, f"slow{number}") for number in range(12)]

    last = ended(connection, "slow11", asks[-1])

    assert last.state is PullState.FAILED
    assert "8 other models wait" in last.message


def test_requests_that_nobody_takes_are_bounded_and_forgotten(
    connection: Connection, embedded_redis: redis.Redis
) -> None:
    write(embedded_redis, KEYS, worker_info(name="w1"))

    for number in range(PULLS_ASKED):
        ask(connection, f"m{number}")

    with pytest.raises(Exception, match="requests wait for worker 'w1' already"):
        ask(connection, "one-more")
    assert embedded_redis.llen(KEYS.pulls("w1")) == PULLS_ASKED
    assert 0 < embedded_redis.ttl(KEYS.pulls("w1")) <= 60


def test_a_request_that_is_none_is_left_out(
    keeper: PullKeeper, connection: Connection, embedded_redis: redis.Redis
) -> None:
    embedded_redis.rpush(KEYS.pulls("w1"), "{}", "x" * 30_000, '{"ask_id": "../", "model": "../../etc"}')

    assert ended(connection, "good", ask(connection, "good")).state is PullState.DONE


def test_a_wrong_worker_is_named(connection: Connection, embedded_redis: redis.Redis) -> None:
    write(embedded_redis, KEYS, worker_info(name="w1", draining=True))

    with pytest.raises(RequestError, match="there is no live worker 'w2'; live now: w1"):
        ask(connection, "m", "w2")
    with pytest.raises(RequestError, match="about to stop"):
        ask(connection, "m")
    with pytest.raises(RequestError, match="is not a model name"):
        ask(connection, "../m")


def test_the_command_follows_a_pull_to_its_end(
    keeper: PullKeeper, embedded_server: EmbeddedServer, embedded_redis: redis.Redis
) -> None:
    good = run(embedded_server, "pull", "good", "--on", "w1", "--no-serve")
    bad = run(embedded_server, "pull", "fails", "--on", "w1")
    told = run(embedded_server, "pull", "good", "--on", "w1", "--no-serve", "--json")

    assert json.loads(told.stdout)["message"] == "the shards of good are on the host of worker w1"
    assert json.loads(told.stdout)["state"] == "done"
    assert good.exit_code == 0, good.stderr
    assert good.stdout == "the shards of good are on the host of worker w1\n"
    assert bad.exit_code == 1
    assert "no room for fails" in bad.stderr


def test_a_worker_that_dies_meanwhile_is_told_of(
    keeper: PullKeeper, embedded_server: EmbeddedServer, embedded_redis: redis.Redis
) -> None:
    def kill() -> None:
        wait_until(lambda: embedded_redis.exists(KEYS.pull("w1", "slow")))
        embedded_redis.delete(KEYS.worker("w1"), KEYS.pull("w1", "slow"))

    killer = threading.Thread(target=kill, name="killer")
    killer.start()
    result = run(embedded_server, "pull", "slow", "--on", "w1")
    killer.join(40)

    assert "worker 'w1' died or was stopped before it had slow" in str(result.exception)


def test_an_interrupted_command_says_that_the_pull_goes_on(
    keeper: PullKeeper, embedded_server: EmbeddedServer, connection: Connection, embedded_redis: redis.Redis
) -> None:
    has_ended = threading.Event()

    def interrupt() -> None:
        wait_until(lambda: embedded_redis.exists(KEYS.pull("w1", "slow")))
        # Again after a while: an interrupt that comes while Python collects garbage is lost.
        for _ in range(8):
            os.kill(os.getpid(), signal.SIGINT)
            if has_ended.wait(5.0):
                return

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever tests before have left
    interrupter = threading.Thread(target=interrupt, name="interrupter")
    interrupter.start()
    result = run(embedded_server, "pull", "slow", "--on", "w1")
    has_ended.set()
    interrupter.join(40)

    assert "interrupted; worker 'w1' goes on with slow" in str(result.exception)
    raw = embedded_redis.get(KEYS.pull("w1", "slow"))
    assert '"running"' in str(raw)


def test_a_process_ends_with_its_worker(started: Started) -> None:
    process = started("slow", EngineTable())

    process.close()

    assert process.outcome() is not None


def test_a_real_process_fetches_from_a_peer_without_torch_in_the_worker(tiny_llama_dir: Path, tmp_path: Path) -> None:
    theirs = ShardStore(tmp_path / "theirs")
    theirs.ensure("tiny", source=tiny_llama_dir)
    server = PeerServer(theirs, "127.0.0.1", 0)
    server.start()
    table = EngineTable(store=tmp_path / "ours", peers=(server.address,), offline=True)

    process = PullProcess("tiny", table)
    wait_until(lambda: process.outcome() is not None, deadline_s=100)
    outcome, progress = process.outcome(), process.progress
    process.close()
    server.close()

    assert outcome == ""
    assert progress.done_bytes == progress.total_bytes > 0
    assert ShardStore(tmp_path / "ours").verify("tiny").name == "tiny"


def test_serving_goes_on_being_told_while_engines_open(
    embedded_redis: redis.Redis, connection: Connection, started: Started
) -> None:
    write(embedded_redis, KEYS, worker_info(name="w1"))
    opened = threading.Event()

    def land(model: str) -> str:
        opened.wait(40)
        return f"the worker serves tiny, {model} now"

    keeper = PullKeeper(embedded_redis, KEYS, "w1", EngineTable(), admitted, land, started)
    keeper.start()
    ask_id = ask(connection, "good")

    opening = wait_until(lambda: (found := status(connection, "good", ask_id)) and found.phase == "open" and found)
    opened.set()
    found = ended(connection, "good", ask_id)
    keeper.stop(40)

    assert opening
    assert opening.state is PullState.RUNNING
    assert "the worker serves tiny, good now" in found.message
