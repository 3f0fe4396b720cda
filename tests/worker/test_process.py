"""A worker process as a whole: signals, and a server or a neighbour that fails under it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella.errors import JobFailed
from lamella.job import Job
from lamella.messages import JobState
from tests.waiting import wait_until
from tests.worker.scripted_engine import scripted_text
from tests.worker.scripted_fleet import ScriptedFleet

ENDLESS = 1_000_000


@pytest.fixture
def fleet(own_server: EmbeddedServer, tmp_path: Path) -> Iterator[ScriptedFleet]:
    fleet = ScriptedFleet(own_server.url, tmp_path)
    yield fleet
    fleet.close()


@pytest.fixture
def client(own_server: EmbeddedServer) -> Iterator[Client]:
    with Client(own_server.url) as client:
        yield client


def submit(client: Client, prompt: str, max_tokens: int) -> Job:
    return client.submit(prompt, model="tiny", max_tokens=max_tokens, require_worker=False)


def wait_for_events(job: Job, num_events: int) -> None:
    wait_until(lambda: job.status().events >= num_events)


def assert_undisturbed(job: Job, prompt: str, num_tokens: int) -> None:
    seqs = [item.seq for item in job.stream(timeout_s=30) if item.seq is not None]
    assert seqs == list(range(1, num_tokens + 2))
    assert job.result(timeout_s=40).text == scripted_text(prompt, num_tokens)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_worker_leaves_at_once_and_signs_off(
    client: Client, fleet: ScriptedFleet, number: signal.Signals
) -> None:
    fleet.start("w1")

    fleet.processes["w1"].send_signal(number)

    assert fleet.processes["w1"].wait(40) == 0
    assert client.workers() == []


def test_a_drain_does_not_wait_for_a_hung_sweep(client: Client, fleet: ScriptedFleet) -> None:
    fleet.start("w1", sweep_s=3600.0, drain_s=20.0)
    jobs = [submit(client, f"hello {n}", 5) for n in range(2)]
    wait_until(lambda: all(job.status().state is JobState.RUNNING for job in jobs))

    began = time.monotonic()
    fleet.processes["w1"].terminate()
    exit_code = fleet.processes["w1"].wait(40)

    assert exit_code == 0
    assert time.monotonic() - began < 20.0
    assert [job.status().state for job in jobs] == [JobState.QUEUED] * 2
    assert [job.status().attempts for job in jobs] == [0, 0]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGQUIT])
def test_a_second_signal_ends_the_process_at_once(client: Client, fleet: ScriptedFleet, second: signal.Signals) -> None:
    fleet.start("w1", sweep_s=3600.0, drain_s=30.0)
    job = submit(client, "hello", 5)
    wait_until(lambda: job.status().state is JobState.RUNNING)

    fleet.processes["w1"].terminate()
    wait_until(lambda: "draining (SIGTERM)" in fleet.log("w1"))
    fleet.processes["w1"].send_signal(second)

    assert fleet.processes["w1"].wait(20) == 1  # far below its 30 s


def test_drained_jobs_are_back_in_the_queue(client: Client, fleet: ScriptedFleet, own_server: EmbeddedServer) -> None:
    fleet.start("w1", slots=2)
    jobs = [submit(client, f"hello {n}", ENDLESS) for n in range(5)]
    wait_until(lambda: sum(job.status().events > 3 for job in jobs) == 2)

    fleet.processes["w1"].terminate()
    fleet.processes["w1"].wait(40)

    with redis.Redis.from_url(own_server.url, protocol=2, decode_responses=True) as look:
        sent, waiting = look.llen("lamella:generate.tiny"), look.zcard("lamella:ready:tiny:1:anonymous")
        assert sent <= 3, "a message for each slot that was told last, and one more"
        assert sent + waiting == 5
        assert look.zcard("lamella:unacked_index") == 0
    assert [job.status().state for job in jobs] == [JobState.QUEUED] * 5
    assert "Traceback" not in fleet.log("w1")


def test_a_server_that_restarts_under_a_job_loses_nothing(
    client: Client, fleet: ScriptedFleet, own_server: EmbeddedServer
) -> None:
    fleet.start("w1")
    jobs = [submit(client, f"hello {n}", 400) for n in range(3)]
    for job in jobs:
        wait_for_events(job, 20)

    own_server.stop()
    own_server.start()

    for number, job in enumerate(jobs):
        assert_undisturbed(job, f"hello {number}", 400)
        assert job.status().attempts == 1
    assert client.generate("afterwards", model="tiny", max_tokens=3, require_worker=False, timeout_s=40).text


def test_a_full_server_stalls_jobs_and_loses_nothing(
    client: Client, fleet: ScriptedFleet, own_server: EmbeddedServer
) -> None:
    fleet.start("w1")
    job = submit(client, "hello", 300)
    wait_for_events(job, 20)

    with redis.Redis.from_url(own_server.url, protocol=2) as admin:
        admin.config_set("maxmemory", "1mb")
        wait_until(lambda: "Redis does not take events" in fleet.log("w1"))
        admin.config_set("maxmemory", "0")

    assert_undisturbed(job, "hello", 300)
    assert client.generate("afterwards", model="tiny", max_tokens=3, require_worker=False, timeout_s=40).text


def test_a_worker_that_slept_past_its_lease_does_not_fork_the_stream(client: Client, fleet: ScriptedFleet) -> None:
    fleet.start("w1", "w2")
    job = submit(client, "hello", 500)
    wait_for_events(job, 20)
    sleeper = job.status().worker
    assert sleeper is not None

    fleet.processes[sleeper].send_signal(signal.SIGSTOP)
    wait_until(lambda: job.status().worker != sleeper)
    fleet.processes[sleeper].send_signal(signal.SIGCONT)

    assert_undisturbed(job, "hello", 500)
    wait_until(lambda: f"job={job.id} dropped here" in fleet.log(sleeper))
    assert job.status().attempts == 2


def test_a_job_that_kills_workers_fails_and_its_neighbours_do_not(client: Client, fleet: ScriptedFleet) -> None:
    names = ["w1", "w2", "w3", "w4"]
    fleet.start(*names)
    neighbours = [submit(client, f"hello {n}", 300) for n in range(3)]
    poison = submit(client, "die now", 5)
    neighbours += [submit(client, f"hello {n}", 300) for n in range(3, 6)]

    with pytest.raises(JobFailed) as caught:
        poison.result(timeout_s=40)

    assert caught.value.code == "attempts_exhausted"
    for number, job in enumerate(neighbours):
        assert_undisturbed(job, f"hello {number}", 300)
    assert sum(fleet.processes[name].poll() == 9 for name in names) == 3


def test_a_message_that_was_lost_is_sent_again(
    client: Client, fleet: ScriptedFleet, own_server: EmbeddedServer
) -> None:
    job = submit(client, "hello", 3)
    with redis.Redis.from_url(own_server.url, protocol=2) as thief:
        thief.delete("lamella:generate.tiny")

    fleet.start("w1")

    assert job.result(timeout_s=40).text == scripted_text("hello", 3)


def test_junk_in_the_queue_does_not_stop_the_worker(
    client: Client, fleet: ScriptedFleet, own_server: EmbeddedServer
) -> None:
    fleet.start("w1")

    with redis.Redis.from_url(own_server.url, protocol=2) as stranger:
        for junk in ("junk", "[]", "{}", '{"body": "!", "properties": {"delivery_tag": "t"}}'):
            stranger.lpush("lamella:generate.tiny", junk)
            completion = client.generate("hello", model="tiny", max_tokens=3, timeout_s=40)
            assert completion.text == scripted_text("hello", 3)

    assert fleet.processes["w1"].poll() is None


def test_a_worker_whose_engine_breaks_gives_its_jobs_back_and_ends(client: Client, fleet: ScriptedFleet) -> None:
    fleet.start("w1")
    job = submit(client, "break now", 5)

    assert fleet.processes["w1"].wait(40) == 1

    assert job.status().state is JobState.QUEUED
    assert job.status().attempts == 0
    assert client.workers() == []


def test_a_worker_without_a_server_waits_for_it_and_still_stops_when_told(
    fleet: ScriptedFleet, own_server: EmbeddedServer
) -> None:
    fleet.start("w1", drain_s=3.0)
    own_server.stop()
    wait_until(lambda: "the heartbeat cannot be written" in fleet.log("w1"))

    fleet.processes["w1"].terminate()

    assert fleet.processes["w1"].wait(40) in (0, 1)  # 1: Celery was waiting for the server, so it was ended
