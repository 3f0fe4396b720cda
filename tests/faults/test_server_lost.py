"""The server dies, stays away, comes back with less than it had, or becomes a replica for a while."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import redis

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella.errors import JobNotFound, ServerRefused, ServerUnreachable
from lamella.job import Job
from lamella.keys import Keys
from lamella.messages import JobState
from lamella.stream_order import StreamItem
from tests.faults.oracle import Undisturbed, assert_as_if_nothing_was
from tests.faults.scripted_jobs import CALM, assert_all_as_if_nothing_was, expected, submit_and_wait
from tests.waiting import wait_until
from tests.worker.scripted_engine import scripted_text
from tests.worker.scripted_fleet import ScriptedFleet

KEYS = Keys()
LONG = [expected(prompt, 300) for prompt in ("hello", "hello again", "good day", "good night")]


class Follower(threading.Thread):
    """Reads a job's stream to its end, or to an error, as a user's program would."""

    def __init__(self, job: Job, timeout_s: float = 60.0) -> None:
        super().__init__(name="follower", daemon=True)
        self.items: list[StreamItem] = []
        self.error: Exception | None = None
        self._stream = job.stream(timeout_s=timeout_s)
        self.start()

    def run(self) -> None:
        try:
            for item in self._stream:
                self.items.append(item)
        except Exception as error:  # noqa: BLE001 - handed to the test, which checks it
            self.error = error

    def assert_saw(self, calm: Undisturbed) -> None:
        """It ended well, and saw every event once."""
        self.join(60.0)
        assert not self.is_alive()
        assert self.error is None
        assert [item.seq for item in self.items if item.seq is not None] == list(range(1, len(calm.token_ids) + 2))


def kill_server(server: EmbeddedServer) -> None:
    """As the kernel does: nothing is written out any more."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.is_running)
    server.stop()


def test_a_killed_server_that_comes_back_with_its_log_loses_nothing(
    near: Client, fleet: ScriptedFleet, own_server: EmbeddedServer
) -> None:
    """Fault 10: running and waiting jobs, twice; every follower goes on by itself."""
    fleet.start("w1", slots=2)
    jobs = [each.submit(near) for each in LONG]
    wait_until(lambda: sum(job.status().events >= 20 for job in jobs) == 2)
    followers = [Follower(job) for job in jobs]

    for _ in range(2):
        kill_server(own_server)
        own_server.start()
        seen = len(followers[0].items)
        wait_until(lambda seen=seen: len(followers[0].items) > seen)

    for follower, calm in zip(followers, LONG, strict=True):
        follower.assert_saw(calm)
    assert_all_as_if_nothing_was(jobs, LONG)
    assert near.generate("afterwards", model="tiny", max_tokens=3, timeout_s=40).text == scripted_text("afterwards", 3)


def test_a_server_that_forgot_its_last_moments_brings_the_same_text(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet, own_server: EmbeddedServer
) -> None:
    """Fault 10, on a host that crashed: the end of the append-only file is gone, and clients have seen more than it."""
    fleet.start("w1")
    jobs = submit_and_wait(near, LONG, 100)
    followers = [Follower(job) for job in jobs]
    wait_until(lambda: all(len(follower.items) >= 100 for follower in followers))

    kill_server(own_server)
    (log,) = (own_server.data_dir / "appendonlydir").glob("*.incr.aof")
    os.truncate(log, int(log.stat().st_size * 0.7))
    own_server.start()

    for follower, calm in zip(followers, LONG, strict=True):
        follower.assert_saw(calm)
    assert_all_as_if_nothing_was(jobs, LONG)


def test_while_the_server_is_away_a_submit_says_so_and_a_reader_goes_on_later(
    near: Client, fleet: ScriptedFleet, own_server: EmbeddedServer, tmp_path: Path
) -> None:
    """Fault 11: long down; the error is clear and in time, and another process resumes by number."""
    fleet.start("w1")
    (job, *_) = submit_and_wait(near, LONG[:1])
    with Client(own_server.url, timeout_s=1.0, heal_s=1.0) as impatient:
        stream = impatient.job(job.id).stream(timeout_s=60)
        seen = [next(stream).seq for _ in range(10)]
        own_server.stop()

        began = time.monotonic()
        with pytest.raises(ServerUnreachable, match="lamella up"):
            impatient.submit("hello", model="tiny")
        assert time.monotonic() - began < 20.0
        with pytest.raises(ServerUnreachable):
            seen.extend(item.seq for item in stream)
        wait_until(lambda: "Redis does not take events" in fleet.log("w1"))
        own_server.start()

        rest = [item.seq for item in impatient.job(job.id).stream(after=seen[-1] or 0, timeout_s=60)]

    assert [*seen, *rest] == list(range(1, 302))
    assert_as_if_nothing_was(job, LONG[0])


def test_lost_data_is_an_error_for_everybody_and_a_hang_for_nobody(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet
) -> None:
    """Fault 13: everything is flushed while jobs run and wait; what comes afterwards is served as ever."""
    fleet.start("w1", slots=2)
    jobs = [each.submit(near) for each in LONG]
    wait_until(lambda: sum(job.status().events >= 20 for job in jobs) == 2)
    followers = [Follower(job) for job in jobs]
    wait_until(lambda: sum(len(follower.items) >= 20 for follower in followers) == 2)

    admin.flushall()

    began = time.monotonic()
    for follower in followers:
        follower.join(40.0)
        assert isinstance(follower.error, JobNotFound)
    assert time.monotonic() - began < 40.0
    with pytest.raises(JobNotFound):
        jobs[0].status()
    wait_until(lambda: fleet.log("w1").count("its record is gone") == 2)
    wait_until(near.workers)
    for calm in CALM:
        assert_as_if_nothing_was(calm.submit(near), calm, attempts=1)


def test_a_server_that_is_a_replica_for_a_while_takes_everything_later(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet
) -> None:
    """Fault 14: READONLY, as in a failover; clients are told, running jobs stall, others wait; nothing doubles."""
    fleet.start("w1", slots=2)
    jobs = [each.submit(near) for each in LONG]
    wait_until(lambda: sum(job.status().events >= 20 for job in jobs) == 2)
    followers = [Follower(job) for job in jobs]

    admin.replicaof("127.0.0.1", "1")
    wait_until(lambda: "Redis does not take events" in fleet.log("w1"))
    with pytest.raises(ServerRefused, match="read-only replica"):
        near.submit("hello", model="tiny")
    stalled = time.monotonic()
    wait_until(lambda: time.monotonic() - stalled > 2.0)
    admin.replicaof("NO", "ONE")

    for follower, calm in zip(followers, LONG, strict=True):
        follower.assert_saw(calm)
    assert_all_as_if_nothing_was(jobs, LONG)
    assert fleet.processes["w1"].poll() is None
    assert near.generate("afterwards", model="tiny", max_tokens=3, timeout_s=40).text == scripted_text("afterwards", 3)


def test_a_server_that_is_a_replica_while_workers_idle_is_lived_through(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet
) -> None:
    """Fault 14: the consumer is thrown out of its wait for messages, and waits again."""
    fleet.start("w1")

    for _ in range(2):
        admin.replicaof("127.0.0.1", "1")
        began = time.monotonic()
        wait_until(lambda began=began: time.monotonic() - began > 2.0)
        admin.replicaof("NO", "ONE")
        job = CALM[0].submit(near)
        assert_as_if_nothing_was(job, CALM[0])

    assert fleet.processes["w1"].poll() is None
    assert job.status().state is JobState.DONE
