"""Clients that vanish or ask twice, clocks that lie, and jobs of a version that nobody here knows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella.keys import Keys
from lamella.messages import JobState
from lamella_worker.config import RedisTable
from lamella_worker.health import check_worker
from tests.faults.oracle import assert_as_if_nothing_was
from tests.faults.scripted_jobs import CALM, assert_all_as_if_nothing_was, expected, submit_and_wait
from tests.faults.tcp_proxy import TcpProxy
from tests.waiting import wait_until
from tests.worker.scripted_fleet import ScriptedFleet

KEYS = Keys()
ROOT = Path(__file__).resolve().parent.parent.parent
HOURS_S = 5 * 3600.0
LONG = expected("hello", 400)
FOLLOW = """
import sys
from lamella import Client
with Client(sys.argv[1]) as client:
    job = client.submit("hello", model="tiny", max_tokens=400, require_worker=False, idempotency_key="k")
    print(job.id, flush=True)
    for seq, event in job.stream(timeout_s=60):
        print(seq, flush=True)
"""


def follow(url: str, *program: str) -> subprocess.Popen[str]:
    """A client process that asks for LONG and prints the job's id and then each number that it hears."""
    return subprocess.Popen(
        [sys.executable, *(program or ("-c", FOLLOW)), url], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_a_client_that_is_killed_leaves_its_job_and_another_one_reads_on(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet, own_server: EmbeddedServer
) -> None:
    """Faults 19 and 20: the job goes on without a reader; the same request under the same key is that job."""
    fleet.start("w1")
    with follow(own_server.url) as first:
        assert first.stdout is not None
        job = near.job(first.stdout.readline().strip())
        heard = [int(first.stdout.readline()) for _ in range(10)]
        os.kill(first.pid, signal.SIGKILL)
        heard = list(dict.fromkeys([*heard, *(int(line) for line in first.stdout if line.endswith("\n"))]))
    channel = KEYS.channel(job.id)
    wait_until(lambda: not dict(admin.pubsub_numsub(channel)).get(channel))
    wait_until(lambda: job.status().state is JobState.DONE)

    with follow(own_server.url) as second:
        assert second.stdout is not None
        lines = second.stdout.read().splitlines()

    assert lines == [job.id, *map(str, range(1, 402))]
    assert heard == list(range(1, len(heard) + 1))
    rest = [item.seq for item in job.stream(after=heard[-1], timeout_s=60)]
    assert [*heard, *rest] == list(range(1, 402))
    assert_as_if_nothing_was(job, LONG, attempts=1)


def test_a_request_sent_many_times_at_once_runs_once(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet, own_server: EmbeddedServer, proxy: TcpProxy
) -> None:
    """Fault 19: from several clients, and by one whose answer was lost on the way; one job, one bill."""
    fleet.start("w1")
    ids: list[str] = []

    def submit(url: str) -> None:
        with Client(url) as client:
            ids.append(client.submit("hello", **{**LONG.options, "idempotency_key": "once"}).id)

    proxy.lose_next_answer_to(b"hello")
    submit(proxy.url)
    assert proxy.lost == 1
    threads = [threading.Thread(target=submit, args=(url,)) for url in [own_server.url, proxy.url] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)

    assert len(ids) == 7
    assert len(set(ids)) == 1
    assert_as_if_nothing_was(near.job(ids[0]), LONG, attempts=1)
    assert admin.zcard(KEYS.jobs) == 1


@pytest.mark.parametrize("shift_s", [HOURS_S, pytest.param(-HOURS_S, marks=pytest.mark.faults)])
def test_a_worker_whose_clock_is_hours_off_works_beside_one_whose_is_not(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet, own_server: EmbeddedServer, shift_s: float
) -> None:
    """Fault 21: leases, deadlines and nudges go by the server's clock; a kill moves all jobs to the wrong clock."""
    fleet.start("liar", slots=4, lease_s=1.0, clock_shift_s=shift_s)
    fleet.start("honest", slots=4, lease_s=1.0)
    calm = [expected(prompt, 300) for prompt in ("hello", "hello again", "good day", "good night", "one", "two two")]
    jobs = submit_and_wait(near, calm)
    assert {job.status().worker for job in jobs} == {"liar", "honest"}
    assert {worker.name for worker in near.workers()} == {"liar", "honest"}
    hopeless = near.submit("sleep", model="tiny", max_tokens=1_000_000, deadline_s=3.0)

    fleet.processes["honest"].kill()

    assert_all_as_if_nothing_was(jobs, calm)
    assert max(job.status().attempts for job in jobs) == 2
    wait_until(lambda: hopeless.status().state is JobState.FAILED)
    assert check_worker(RedisTable(url=own_server.url), "liar", 900.0, 5.0).is_healthy
    wait_until(lambda: not admin.zcard(KEYS.flight("tiny")))


def test_a_client_whose_clock_is_hours_off_is_served_like_any_other(
    near: Client, fleet: ScriptedFleet, own_server: EmbeddedServer, tmp_path: Path
) -> None:
    """Fault 21: it asks, waits and hears; its deadline is that of the server's clock."""
    fleet.start("w1")
    program = tmp_path / "late_client.py"
    program.write_text(FOLLOW.replace('idempotency_key="k"', 'deadline_s=30.0, priority="high"'))

    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.lying_clock", str(HOURS_S), "late_client", own_server.url],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
    ) as process:
        assert process.stdout is not None
        job_id, *heard = process.stdout.read().split()

    assert heard == [str(number) for number in range(1, 402)]
    assert_as_if_nothing_was(near.job(job_id), LONG, attempts=1)


def test_a_job_of_an_unknown_version_is_left_for_a_newer_worker(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet
) -> None:
    """Fault 23: parked without an attempt and without a place among the running; others pass it."""
    job = CALM[0].submit(near)
    version = admin.hget(KEYS.job(job.id), "v")
    admin.hset(KEYS.job(job.id), "v", 99)
    fleet.start("w1", slots=1)

    wait_until(lambda: f"job={job.id} is of a newer schema" in fleet.log("w1"))
    for calm in CALM[1:]:
        assert_as_if_nothing_was(calm.submit(near), calm, attempts=1)
    assert admin.hget(KEYS.job(job.id), "state") == "queued"
    assert fleet.processes["w1"].poll() is None

    admin.hset(KEYS.job(job.id), mapping={"v": version, "nudged_at": 1})  # as if a worker that knows it looked after it

    assert_as_if_nothing_was(job, CALM[0], attempts=1)
