"""Each role's user does its whole work on a real server, and is refused what is not its work."""

from __future__ import annotations

import re
import tempfile
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner

from lamella import keys
from lamella.acl import Role, grants, user_line
from lamella.cli.app import app
from lamella.client import Client
from lamella.errors import ConfigError, ServerRefused
from lamella.keys import Keys
from lamella.messages import Done, JobState
from lamella.registry_calls import CancelStatus
from lamella_gateway.api_keys import make_key, shown_key, store_key
from lamella_worker.config import RedisTable
from lamella_worker.health import check_worker
from lamella_worker.metrics_fleet import FleetReader
from lamella_worker.monitor import make_monitor
from lamella_worker.registry import open_redis
from tests.fixtures.servers import require_embedded
from tests.gateway.batch_lines import begin, chat_line, ended
from tests.gateway.running_gateway import RunningGateway
from tests.security.secured_server import SecuredServer, secured_server
from tests.security.secured_worker import MODEL, PREFIX, SecuredWorker
from tests.waiting import wait_until

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
KEYS = Keys(PREFIX)
LONG = 450


def test_a_client_does_its_whole_work_and_a_worker_serves_it(
    client: Client, secured: SecuredServer, guarded_worker: SecuredWorker
) -> None:
    secured.forget_refusals()

    job = client.submit("The river runs", model=MODEL, max_tokens=8, ignore_eos=True, idempotency_key="once")
    again = client.submit("The river runs", model=MODEL, max_tokens=8, ignore_eos=True, idempotency_key="once")
    items = list(job.stream(timeout_s=40))
    long = client.submit("On and on", model=MODEL, max_tokens=LONG, ignore_eos=True)
    first = next(item for item in long.stream(timeout_s=40) if item.seq is not None)
    outcome = long.cancel()
    wait_until(lambda: long.status().state.is_final)
    waiting = client.submit("Nobody serves this", model="nobody", require_worker=False)

    assert again.id == job.id
    assert isinstance(items[-1].event, Done)
    assert first.seq == 1
    assert outcome is CancelStatus.REQUESTED
    assert waiting.cancel() is CancelStatus.CANCELLED
    assert job.status().state is JobState.DONE
    assert {job.id, long.id} <= {listed.job_id for listed in client.jobs()}
    assert client.dead_jobs() == []
    assert [model.name for model in client.models()] == [MODEL]
    assert [worker.model.name for worker in client.workers()] == [MODEL]
    assert secured.refusals() == []


def test_a_gateway_does_its_whole_work(client: Client, secured: SecuredServer, guarded_worker: SecuredWorker) -> None:
    key, secret = make_key("notebook", "ada", requests_per_minute=60, tokens_per_day=100_000, is_admin=True)
    with secured.admin() as admin:
        for command in next(store_key(KEYS, key, secret)).commands:
            admin.execute_command(*command)
    secured.forget_refusals()

    url = secured.url(Role.GATEWAY)
    with (
        RunningGateway(url, prefix=PREFIX, requires_key=True) as gateway,
        gateway.client(shown_key(key, secret)) as sdk,
    ):
        answer = sdk.completions.create(model=MODEL, prompt="The river runs", max_tokens=4)
        made = sdk.responses.create(model=MODEL, input="Go on", max_output_tokens=4, background=True)
        events = list(sdk.responses.retrieve(made.id, stream=True))
        told = [
            sdk.get(f"{gateway.url}/lamella/{what}", cast_to=object)
            for what in ("workers", "queues", "jobs", "jobs?state=done", f"jobs/{made.id.removeprefix('resp_')}")
        ]
        sdk.post(f"{gateway.url}/lamella/jobs/{made.id.removeprefix('resp_')}/cancel", cast_to=object)
        sdk.responses.delete(made.id)
        batch = ended(sdk, begin(sdk, [chat_line(number, model=MODEL, max_tokens=2) for number in range(3)]))
        with secured.admin() as admin:
            wait_until(lambda: admin.exists(KEYS.unbilled) == 0)

    assert answer.usage.completion_tokens == 4
    assert events[-1].sequence_number == len(events) - 1
    assert len(told) == 5
    assert (batch.status, batch.request_counts.completed if batch.request_counts else 0) == ("completed", 3)
    assert secured.refusals() == []


def test_a_monitor_does_its_whole_work(client: Client, secured: SecuredServer, guarded_worker: SecuredWorker) -> None:
    secured.forget_refusals()
    monitor = make_monitor(secured.url(Role.MONITOR), PREFIX)
    inspection = monitor.control.inspect(timeout=3, limit=1)
    seen: list[str] = []

    def note(event: dict[str, object]) -> None:
        seen.append(str(event["type"]))
        receiver.should_stop = True

    try:
        wait_until(inspection.ping)  # a worker is listed a moment before it listens to broadcasts
        answers = {question: getattr(inspection, question)() for question in ("stats", "active", "report", "conf")}
        with monitor.connection_for_read() as connection:
            receiver = monitor.events.Receiver(connection, handlers={"*": note}, app=monitor)
            client.submit("Look at me", model=MODEL, max_tokens=2).result(40)
            receiver.capture(limit=None, timeout=40, wakeup=True)
        with Client(secured.url(Role.MONITOR), prefix=PREFIX) as onlooker:
            listed = onlooker.workers()
        with secured.login(Role.MONITOR) as counting:
            lengths = counting.llen(KEYS.queue_list(MODEL)), counting.zcard(KEYS.active)
    finally:
        monitor.close()

    assert all(answers.values())
    assert seen
    assert [worker.model.name for worker in listed] == [MODEL]
    assert lengths[0] == 0
    assert not [refusal for refusal in secured.refusals() if "monitor" in refusal]


def test_a_worker_takes_no_orders_from_a_monitor(
    client: Client, secured: SecuredServer, guarded_worker: SecuredWorker
) -> None:
    monitor = make_monitor(secured.url(Role.MONITOR), PREFIX)
    try:
        # A worker is listed a moment before it listens to broadcasts.
        answers = wait_until(lambda: monitor.control.broadcast("shutdown", reply=True, timeout=3, limit=1))
    finally:
        monitor.close()

    assert "answers questions only" in str(answers)
    assert client.submit("Still there?", model=MODEL, max_tokens=2).result(40).usage.completion_tokens == 2


def test_the_health_check_works_as_a_worker_and_as_a_monitor(
    secured: SecuredServer, guarded_worker: SecuredWorker
) -> None:
    for role in (Role.WORKER, Role.MONITOR):
        table = RedisTable.model_validate({"url": secured.url(role), "prefix": PREFIX})

        assert check_worker(table, None, 900.0, 40.0).is_healthy


def test_metrics_of_the_service_are_read_with_the_rights_of_their_role(
    client: Client, secured: SecuredServer, guarded_worker: SecuredWorker
) -> None:
    client.submit("Count me", model=MODEL, max_tokens=2).result(40)
    client.submit("And me", model="nobody", require_worker=False)
    secured.forget_refusals()

    with closing(open_redis(secured.url(Role.METRICS), 40.0)) as reading:
        fleet = FleetReader(reading, KEYS).read()

    assert fleet is not None
    assert fleet.queued["nobody"] >= 1
    assert [worker.model.name for worker in fleet.workers] == [MODEL]
    assert secured.refusals() == []


JOB, TOKENS, HEARTBEAT, QUEUE = KEYS.job("1"), KEYS.stream("1"), KEYS.worker("w"), KEYS.queue_list(MODEL)
EVERYBODY = (
    ("FLUSHALL",), ("FLUSHDB",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("SCAN", "0"), ("MONITOR",), ("SHUTDOWN",),
    ("ACL", "LIST"), ("EVAL", "return 1", "0"), ("SCRIPT", "FLUSH"), ("FUNCTION", "LIST"), ("DEBUG", "SLEEP", "0"),
    ("GET", "other:key"), ("SET", "other:key", "1"), ("PUBLISH", "other:channel", "x"), ("CLIENT", "LIST"),
    ("RENAME", JOB, "other:key"), ("SWAPDB", "0", "1"), ("REPLICAOF", "127.0.0.1", "1"), ("SAVE",),
    ("PUBSUB", "CHANNELS"),
)  # fmt: skip
CLIENTS_MAY_NOT = (
    ("RPOP", QUEUE), ("BRPOP", QUEUE, "1"), ("LRANGE", QUEUE, "0", "-1"), ("SET", HEARTBEAT, "{}"), ("DEL", JOB),
    ("ZADD", KEYS.workers, "1", "w"), ("SCRIPT", "LOAD", "return 1"), ("SET", KEYS.reconciler, "me"),
    ("XTRIM", TOKENS, "MAXLEN", "0"), ("HGET", f"{PREFIX}unacked", "tag"),
    ("SADD", f"{PREFIX}_kombu.binding.x", "y"), ("PUBLISH", f"{PREFIX}/0.celery.pidbox", "{}"),
    ("PSUBSCRIBE", f"{PREFIX}*"), ("LPUSH", f"{PREFIX}celeryev.x", "y"), ("HSET", KEYS.worker("w"), "a", "b"),
)  # fmt: skip
MONITORS_MAY_NOT = (
    ("HGETALL", JOB), ("HMGET", JOB, "request"), ("HGET", JOB, "state"), ("XRANGE", TOKENS, "-", "+"),
    ("XREAD", "STREAMS", TOKENS, "0"), ("SUBSCRIBE", KEYS.channel("1")), ("PSUBSCRIBE", f"{PREFIX}ch:*"),
    ("LPUSH", QUEUE, "x"), ("BRPOP", QUEUE, "1"), ("ZADD", KEYS.active, "1", "x"), ("HSET", JOB, "cancel", "1"),
    ("SET", HEARTBEAT, "{}"), ("HGETALL", KEYS.idempotency("k")), ("HGET", f"{PREFIX}unacked", "t"),
    ("SCRIPT", "LOAD", "return 1"), ("ZRANGE", KEYS.jobs, "0", "-1"),
    ("SADD", f"{PREFIX}_kombu.binding.generate.{MODEL}", "x"),
)  # fmt: skip
METRICS_MAY_NOT = (
    ("HGETALL", JOB), ("XRANGE", TOKENS, "-", "+"), ("SUBSCRIBE", KEYS.channel("1")), ("HSET", JOB, "cancel", "1"),
    ("ZADD", KEYS.active, "1", "x"), ("LLEN", QUEUE), ("LPUSH", QUEUE, "x"), ("DEL", JOB), ("SET", HEARTBEAT, "{}"),
    ("EVALSHA", "0" * 40, "0"), ("SCRIPT", "LOAD", "return 1"), ("PUBLISH", KEYS.channel("1"), "x"), ("INFO",),
    ("HMGET", KEYS.api_key("k"), "user"), ("HMGET", KEYS.idempotency("k"), "job"),
)  # fmt: skip
GATEWAYS_MAY_NOT = (
    *CLIENTS_MAY_NOT[:4], ("SCRIPT", "LOAD", "return 1"), ("HSET", KEYS.api_key("k"), "user", "x"),
    ("DEL", KEYS.api_key("k")), ("ZADD", KEYS.api_keys, "1", "k"), ("HSET", KEYS.limits, "a", "1"),
)  # fmt: skip
WORKERS_MAY_NOT = (("GET", "other"), ("HGETALL", "other:job:1"), ("SUBSCRIBE", "other:ch:1"), ("SCRIPT", "KILL"))


@pytest.mark.parametrize(
    ("role", "command"),
    [
        *((role, command) for role in Role for command in EVERYBODY),
        *((Role.CLIENT, command) for command in CLIENTS_MAY_NOT),
        *((Role.CLIENT, command) for command in (("HGETALL", KEYS.api_key("k")), ("HGETALL", KEYS.unbilled))),
        *((Role.GATEWAY, command) for command in GATEWAYS_MAY_NOT),
        *((Role.MONITOR, command) for command in MONITORS_MAY_NOT),
        *((Role.METRICS, command) for command in METRICS_MAY_NOT),
        *((Role.WORKER, command) for command in WORKERS_MAY_NOT),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60],
)
def test_a_role_may_not(secured: SecuredServer, role: Role, command: tuple[str, ...]) -> None:
    with secured.admin() as admin:
        answer = admin.execute_command("ACL", "DRYRUN", f"lamella-{role.value}", *command)

    assert "no permissions" in str(answer)


def test_a_script_runs_with_the_rights_of_its_caller(secured: SecuredServer) -> None:
    with secured.admin() as admin:
        digest = admin.script_load("return redis.call('RPOP', KEYS[1])")
        admin.lpush(f"{PREFIX}generate.bait", "message")

    with secured.login(Role.CLIENT) as client, pytest.raises(redis.ResponseError, match=r"(?i)permission|ACL"):
        client.evalsha(digest, 1, f"{PREFIX}generate.bait")
    with secured.admin() as admin:
        assert admin.lpop(f"{PREFIX}generate.bait") == "message"
        admin.acl_log_reset()


def test_nobody_comes_in_without_a_login(secured: SecuredServer) -> None:
    address = f"unix://lamella-client:wrong@{secured.socket}"
    with redis.Redis(unix_socket_path=str(secured.socket), protocol=2) as anonymous, pytest.raises(redis.RedisError):
        anonymous.ping()
    with Client(address, prefix=PREFIX) as client, pytest.raises(ServerRefused, match="user name or pass") as refused:
        client.workers()
    assert "wrong" not in str(refused.value).replace("is wrong", "")
    with secured.admin() as admin:
        admin.acl_log_reset()


def test_a_client_whose_server_lacks_the_scripts_is_told_what_to_do() -> None:
    require_embedded()
    with (
        tempfile.TemporaryDirectory(prefix="lam-") as directory,
        secured_server(Path(directory), PREFIX) as server,
        Client(server.url(Role.CLIENT), prefix=PREFIX) as client,
        pytest.raises(ServerRefused) as refused,
    ):
        client.submit("Anybody?", model="nobody", require_worker=False)

    assert "a worker loads them" in str(refused.value)


def test_the_files_in_configs_are_what_the_command_prints() -> None:
    for role in Role:
        printed = CliRunner().invoke(app, ["acl", "--role", role.value]).output

        assert (CONFIGS / f"{role.value}.acl").read_text() == printed == user_line(role, "lamella:", []) + "\n"


def test_the_command_prints_a_whole_file_with_hashes_only(tmp_path: Path) -> None:
    arguments = ["acl", "--prefix", "mine:", "--db", "3"]
    for name in ("client", "gateway", "worker", "monitor", "metrics", "admin"):
        (tmp_path / name).write_text(f"secret-of-{name}\n")
        arguments += [f"--{name}-password-file", str(tmp_path / name)]

    result = CliRunner().invoke(app, [*arguments, "--client-password-file", str(tmp_path / "admin")])

    lines = result.output.splitlines()
    assert [line.split()[1] for line in lines] == [
        "default", "lamella-admin", "lamella-client", "lamella-gateway", "lamella-worker", "lamella-monitor",
        "lamella-metrics",
    ]  # fmt: skip
    assert "secret" not in result.output
    assert lines[0] == "user default reset"
    assert all(" on " in line for line in lines[1:])
    assert lines[2].count(" #") == 2
    assert "&mine:/3.celery.pidbox" in lines[5]
    assert "lamella:" not in result.output


@pytest.mark.parametrize("prefix", ["", "a b", "~*", "x" * 65, "a\nuser b on"])
def test_a_prefix_that_would_widen_the_rules_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="prefix"):
        user_line(Role.CLIENT, prefix, ["pw"])


def test_every_key_and_script_of_the_registry_has_its_place_in_a_role() -> None:
    assert keys.__doc__ is not None
    named = re.findall(r"^``([^`]+)``", keys.__doc__, re.MULTILINE)
    patterns = [
        pattern for role in Role for grant in grants(role) for pattern in (*grant.keys, *grant.reads, *grant.channels)
    ]

    missing = [name for name in named if not any(fnmatchcase(re.sub(r"{\w+}", "x", name), p) for p in patterns)]

    assert missing == []
