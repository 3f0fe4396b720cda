"""Faults of an engine process around the scripted engine, which starts in a fraction of a real one's time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella.errors import JobFailed
from lamella.messages import EngineProcessInfo, Failed, JobState
from lamella_worker.config import RedisTable
from lamella_worker.health import check_worker
from lamella_worker.monitor import make_monitor
from tests.faults.scripted_jobs import CALM, assert_all_as_if_nothing_was, expected, submit_and_wait
from tests.waiting import wait_until
from tests.worker.scripted_engine import scripted_text
from tests.worker.scripted_fleet import ScriptedFleet

NAME = "w1"


@pytest.fixture
def client(own_server: EmbeddedServer) -> Iterator[Client]:
    with Client(own_server.url) as client:
        yield client


def start(fleet: ScriptedFleet, failpoints: str = "", *settings: str) -> None:
    fleet.start(NAME, isolation="child", failpoints=failpoints, settings=settings, drain_s=20.0)


def engine(client: Client) -> EngineProcessInfo:
    """The engine process, once its engine is open."""

    def ready() -> EngineProcessInfo | None:
        found = [worker.engine_process for worker in client.workers() if worker.name == NAME]
        return found[0] if found and found[0] is not None and found[0].state == "ready" else None

    return wait_until(ready)


def signal_engine(client: Client, number: signal.Signals) -> int:
    pid = engine(client).pid
    assert pid is not None
    os.kill(pid, number)
    return pid


@pytest.mark.parametrize("fault", ["hang", "freeze"])
def test_a_hung_sweep_is_ended_within_its_deadline_and_the_jobs_go_on(
    client: Client, fleet: ScriptedFleet, fault: str
) -> None:
    """Fault 4."""
    start(fleet, f"sweep={fault}@40#0", "worker.hang_s=1.0", "worker.hang_sweeps=3.0")
    began = time.monotonic()

    jobs = submit_and_wait(client)

    assert_all_as_if_nothing_was(jobs, attempts=2)
    assert time.monotonic() - began < 35
    wait_until(lambda: engine(client).restarts == 1)
    assert "hung" in (engine(client).trouble or "")


def test_an_engine_killed_for_its_memory_comes_back_smaller(client: Client, fleet: ScriptedFleet) -> None:
    """Fault 5."""
    start(fleet)
    jobs = submit_and_wait(client)

    killed = signal_engine(client, signal.SIGKILL)

    assert_all_as_if_nothing_was(jobs, attempts=2)
    wait_until(lambda: engine(client).pid != killed)
    assert engine(client).max_sequences == 4
    assert [worker.slots for worker in client.workers()] == [4]
    assert "memory was short: the next engine runs at most 4 sequences" in fleet.log(NAME)


def test_a_poisoned_job_is_alone_when_it_does_harm_again_and_is_dead_after_three(
    client: Client, fleet: ScriptedFleet
) -> None:
    """Fault 7."""
    start(fleet, "submit=segfault@1+~poison")
    jobs = submit_and_wait(client, num_events=10)

    poison = expected("a poisoned well").submit(client)

    with pytest.raises(JobFailed) as caught:
        poison.result(timeout_s=60)
    assert caught.value.code == "attempts_exhausted"
    events = [item.event for item in poison.stream() if item.seq is not None]
    assert [type(event) for event in events] == [Failed]
    assert_all_as_if_nothing_was(jobs)
    assert max(job.status().attempts for job in jobs) <= 2, "it does harm to others once at most"
    wait_until(lambda: engine(client).restarts == 3)
    assert client.generate("hello", model="tiny", max_tokens=3, timeout_s=40).text == scripted_text("hello", 3)


def test_a_stop_while_the_engine_is_away_gives_jobs_back(client: Client, fleet: ScriptedFleet) -> None:
    """Faults 3 and 8."""
    start(fleet, "open=hang#1")
    jobs = submit_and_wait(client)
    signal_engine(client, signal.SIGSEGV)
    wait_until(lambda: all(job.status().state is JobState.QUEUED for job in jobs))

    began = time.monotonic()
    fleet.processes[NAME].terminate()
    exit_code = fleet.processes[NAME].wait(40)

    assert exit_code == 0
    assert time.monotonic() - began < 20
    assert [job.status().attempts for job in jobs] == [1] * 4
    start(fleet)
    assert_all_as_if_nothing_was(jobs, attempts=2)


def test_a_drain_costs_no_attempt(client: Client, fleet: ScriptedFleet, own_server: EmbeddedServer) -> None:
    """Fault 8."""
    start(fleet)
    jobs = submit_and_wait(client)

    fleet.processes[NAME].terminate()

    assert fleet.processes[NAME].wait(40) == 0
    assert [job.status().attempts for job in jobs] == [0] * 4
    with redis.Redis.from_url(own_server.url, protocol=2) as look:
        assert look.zcard("lamella:flight:tiny") + look.zcard("lamella:ready:tiny:1:anonymous") == 4
    start(fleet)
    assert_all_as_if_nothing_was(jobs, attempts=1)


def test_an_engine_does_not_outlive_its_worker(client: Client, fleet: ScriptedFleet) -> None:
    """Fault 1."""
    start(fleet)
    jobs = submit_and_wait(client)
    pid = engine(client).pid

    fleet.processes[NAME].kill()

    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    fleet.processes[NAME].wait(40)
    start(fleet)
    assert_all_as_if_nothing_was(jobs, attempts=2)


def test_an_engine_that_cannot_be_kept_running_ends_its_worker_and_keeps_the_job(
    client: Client, fleet: ScriptedFleet
) -> None:
    """Fault 3, for good."""
    start(fleet, "submit=exit@1+", "worker.max_restarts=1")

    job = CALM[0].submit(client)

    assert fleet.processes[NAME].wait(40) == 1
    assert "ended 2 times within 600 s and is not started again" in fleet.log(NAME)
    assert "Traceback" not in fleet.log(NAME)
    assert job.status().state is JobState.QUEUED
    assert client.workers() == []


def test_a_server_that_is_away_stalls_the_engine_which_is_not_taken_for_hung(
    client: Client, fleet: ScriptedFleet, own_server: EmbeddedServer
) -> None:
    """Faults 4 and 12."""
    start(fleet, "", "worker.hang_s=0.5", "worker.hang_sweeps=2.0")
    jobs = submit_and_wait(client)

    with redis.Redis.from_url(own_server.url, protocol=2) as admin:
        admin.config_set("maxmemory", "1mb")
        wait_until(lambda: "Redis does not take events" in fleet.log(NAME))
        stalled = time.monotonic()
        wait_until(lambda: time.monotonic() - stalled > 2.0)
        admin.config_set("maxmemory", "0")

    assert_all_as_if_nothing_was(jobs, attempts=1)
    assert engine(client).restarts == 0


def test_flower_and_the_health_check_show_the_engine_process(
    client: Client, fleet: ScriptedFleet, own_server: EmbeddedServer
) -> None:
    start(fleet)
    url = own_server.url
    signal_engine(client, signal.SIGSEGV)
    wait_until(lambda: engine(client).restarts == 1)

    stats = wait_until(lambda: make_monitor(url, "lamella:").control.inspect(timeout=2.0).stats())

    (figures,) = stats.values()
    shown = figures["lamella"]["engine_process"]
    assert shown == engine(client).model_dump(mode="json")
    health = check_worker(RedisTable(url=url), NAME, 900.0, 5.0)
    assert health.is_healthy
    assert f"engine process {shown['pid']}, ready, restarted 1 times" in health.reason
