"""Signs of life: what a worker says of itself, and how its health is judged by it."""

from __future__ import annotations

import time

import fakeredis
import redis

from lamella.keys import WORKER_TTL_S, Keys
from lamella.messages import ModelInfo, WorkerInfo
from lamella_engine.sequence_types import EngineCounters, EngineFacts
from lamella_worker.engine_port import ServedModel
from lamella_worker.health import check_health
from lamella_worker.heartbeat import Heartbeat, WorkerFacts
from lamella_worker.job_table import JobTable
from lamella_worker.local_host import LocalHost
from lamella_worker.running_job import RunningJob
from lamella_worker.serving import Serving
from tests.waiting import wait_until
from tests.worker.scripted_engine import ScriptedEngine, ScriptedSet

FACTS = EngineFacts("served", "llama", "float32", "cpu", 4, 512, 1000, 8)


def counters(last_sweep_at: float | None) -> EngineCounters:
    return EngineCounters(
        running=0, waiting=0, sweeps=7, tokens=70, streamed_bytes=700, peak_rss_bytes=9000, last_sweep_at=last_sweep_at
    )


class ToldEngine(ScriptedEngine):
    """A scripted engine with figures of its own."""

    def __init__(self, last_sweep_at: float | None) -> None:
        self._told = counters(last_sweep_at)
        super().__init__()

    @property
    def facts(self) -> EngineFacts:
        return FACTS

    def counters(self) -> EngineCounters:
        return self._told


def facts(table: JobTable, last_sweep_at: float | None = None, *models: str) -> WorkerFacts:
    """What a worker tells whose engines are closed again, so that nothing is left behind."""
    names = models or ("owner/name",)
    opened = ScriptedSet({name: ToldEngine(last_sweep_at) for name in names})
    serving = Serving([ServedModel(name, name) for name in names], lambda models, is_called_off: LocalHost(opened))
    opened.close()
    return WorkerFacts("w1", "cpu", serving, table)


def worker_info(**changes: object) -> WorkerInfo:
    now = time.time()
    values: dict[str, object] = {
        "name": "w1",
        "host": "elsewhere",
        "pid": 1,
        "version": "0",
        "device": "cpu",
        "model": ModelInfo(name="m", family="f", dtype="d", num_layers=1, context_length=1, size_bytes=1),
        "slots": 8,
        "running": 0,
        "draining": False,
        "started_at": now,
        "heartbeat_at": now,
        "last_sweep_at": None,
        "sweeps": 0,
        "tokens": 0,
        "streamed_bytes": 0,
        "peak_rss_bytes": 0,
    }
    return WorkerInfo.model_validate({**values, **changes})


def write(client: redis.Redis, keys: Keys, info: WorkerInfo) -> None:
    client.set(keys.worker(info.name), info.model_dump_json())
    client.zadd(keys.workers, {info.name: 1})


def test_a_worker_tells_the_name_it_serves_its_model_under() -> None:
    info = facts(JobTable()).info(is_draining=True)

    assert info.model.name == "owner/name"
    assert (info.slots, info.sweeps, info.tokens, info.draining) == (8, 7, 70, True)


def test_a_busy_worker_is_not_blamed_for_the_quiet_time_before() -> None:
    table = JobTable()
    long_ago = time.time() - 3600

    with table.listed(RunningJob("a", 1, 1, 1)):
        busy = facts(table, long_ago).info(is_draining=False)
        first = facts(table, None).info(is_draining=False)
    idle = facts(table, long_ago).info(is_draining=False)

    assert (busy.running, idle.running) == (1, 0)
    assert busy.last_sweep_at is not None
    assert busy.last_sweep_at > long_ago + 3000
    assert first.last_sweep_at is not None
    assert idle.last_sweep_at == long_ago


def test_heartbeats_are_written_with_a_time_to_live_and_removed_at_the_end(fake_redis: redis.Redis, keys: Keys) -> None:
    heartbeat = Heartbeat(fake_redis, keys, "w1", lambda: worker_info())

    heartbeat.start()
    wait_until(lambda: fake_redis.zscore(keys.workers, "w1"))

    assert 0 < fake_redis.ttl(keys.worker("w1")) <= WORKER_TTL_S
    heartbeat.stop(5)
    assert fake_redis.get(keys.worker("w1")) is None
    assert fake_redis.zcard(keys.workers) == 0


def test_a_heartbeat_outlasts_a_redis_that_is_away(
    fake_redis: redis.Redis, fake_server: fakeredis.FakeServer, keys: Keys
) -> None:
    fake_server.connected = False
    heartbeat = Heartbeat(fake_redis, keys, "w1", lambda: worker_info())
    heartbeat.start()

    fake_server.connected = True

    wait_until(lambda: fake_redis.get(keys.worker("w1")))
    heartbeat.stop(5)


def test_a_fresh_worker_is_healthy_by_name(fake_redis: redis.Redis, keys: Keys) -> None:
    write(fake_redis, keys, worker_info(running=2, last_sweep_at=time.time()))

    health = check_health(fake_redis, keys, "w1", 60)

    assert health.is_healthy
    assert health.reason == "worker w1: 2 of 8 slots busy"


def test_a_stuck_worker_is_not_healthy(fake_redis: redis.Redis, keys: Keys) -> None:
    write(fake_redis, keys, worker_info(running=1, last_sweep_at=time.time() - 100))

    health = check_health(fake_redis, keys, "w1", 60)

    assert not health.is_healthy
    assert "the last sweep ended 1" in health.reason


def test_a_silent_worker_is_not_healthy(fake_redis: redis.Redis, keys: Keys) -> None:
    write(fake_redis, keys, worker_info())
    fake_redis.delete(keys.worker("w1"))  # as it expires

    health = check_health(fake_redis, keys, "w1", 60)

    assert not health.is_healthy
    assert "no heartbeat of worker w1" in health.reason


def test_a_worker_whose_clock_is_wrong_is_judged_by_its_own(fake_redis: redis.Redis, keys: Keys) -> None:
    then = time.time() - 18_000
    write(fake_redis, keys, worker_info(running=1, heartbeat_at=then, last_sweep_at=then - 1))

    assert check_health(fake_redis, keys, "w1", 60).is_healthy


def test_an_idle_worker_with_an_old_sweep_is_healthy(fake_redis: redis.Redis, keys: Keys) -> None:
    write(fake_redis, keys, worker_info(last_sweep_at=time.time() - 1000))

    assert check_health(fake_redis, keys, "w1", 60).is_healthy


def test_another_hosts_worker_does_not_make_this_one_healthy(fake_redis: redis.Redis, keys: Keys) -> None:
    write(fake_redis, keys, worker_info(host="elsewhere"))

    assert not check_health(fake_redis, keys, None, 60).is_healthy
    assert not check_health(fake_redis, keys, "w2", 60).is_healthy


def test_an_unreachable_redis_or_an_unreadable_heartbeat_is_not_healthy(
    fake_redis: redis.Redis, fake_server: fakeredis.FakeServer, keys: Keys
) -> None:
    fake_redis.set(keys.worker("w1"), '{"name": "w1"}')

    assert "another version" in check_health(fake_redis, keys, "w1", 60).reason
    fake_server.connected = False
    assert "Redis does not answer" in check_health(fake_redis, keys, "w1", 60).reason
    fake_server.connected = True


def test_the_queue_learns_of_a_workers_slots_and_forgets_them_when_it_goes(fake_redis: redis.Redis, keys: Keys) -> None:
    heartbeat = Heartbeat(fake_redis, keys, "w1", lambda: worker_info(slots=8))

    heartbeat.start()
    assert wait_until(lambda: fake_redis.get(keys.capacity("m")) == "8")
    heartbeat.stop(40)

    assert fake_redis.get(keys.capacity("m")) is None


def test_a_draining_worker_offers_no_slots(fake_redis: redis.Redis, keys: Keys) -> None:
    for name, draining in (("w1", True), ("w2", False)):
        Heartbeat(fake_redis, keys, name, lambda draining=draining: worker_info(slots=8, draining=draining)).beat()

    assert fake_redis.get(keys.capacity("m")) == "8"


def test_every_model_is_told_with_its_own_jobs_and_slots() -> None:
    table = JobTable()
    told = facts(table, None, "a", "owner/b")

    with table.listed(RunningJob("x", 1, 1, 1, model="owner/b")):
        info = told.info(is_draining=False)

    assert [(model.name, model.slots, model.running) for model in info.served] == [("a", 8, 0), ("owner/b", 8, 1)]
    assert (info.model.name, info.slots, info.running) == ("a", 16, 1)
    assert WorkerInfo.model_validate_json(info.model_dump_json(), strict=True) == info


def test_a_heartbeat_of_an_earlier_version_serves_its_one_model() -> None:
    info = worker_info(slots=3, running=2)

    assert [(model.name, model.slots, model.running) for model in info.served] == [("m", 3, 2)]
