"""Workers that are killed, stopped or frozen, also at every step between taking a message and acknowledging it."""

from __future__ import annotations

import math
import signal
import sys
import time

import pytest
import redis

from lamella.client import Client
from lamella.keys import Keys
from lamella.messages import JobState
from tests.faults.oracle import assert_as_if_nothing_was
from tests.faults.scripted_jobs import CALM, assert_all_as_if_nothing_was, expected, submit_and_wait
from tests.waiting import wait_until
from tests.worker.scripted_fleet import ScriptedFleet

KEYS = Keys()
LEASE_S = 2.0
GRACE_S = 2.0  # what recovery may take beyond the lease
STALL_S = 1.5  # what a test machine with other work may add in a test that is not `timing`


def kill_holder(near: Client, admin: redis.Redis, fleet: ScriptedFleet, job_id: str) -> tuple[str, float]:
    """Kill the worker that has the job; returns its name and the seconds until the job's next event."""
    name = near.status(job_id).worker
    assert name is not None
    fleet.processes[name].kill()
    fleet.processes[name].wait(40)
    killed, seq = time.monotonic(), int(admin.hget(KEYS.job(job_id), "seq") or 0)
    wait_until(lambda: int(admin.hget(KEYS.job(job_id), "seq") or 0) > seq, every_s=0.005)
    return name, time.monotonic() - killed


@pytest.mark.parametrize(
    ("num_kills", "slack_s"),
    [(2, STALL_S), pytest.param(20, 0.0, marks=[pytest.mark.faults, pytest.mark.timeout(240)])],
)
def test_a_killed_workers_job_goes_on_within_its_lease_and_two_seconds(
    near: Client,
    admin: redis.Redis,
    fleet: ScriptedFleet,
    num_kills: int,
    slack_s: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fault 1: kill -9, again and again; every recovery counts, and so does the one job's stream in the end."""
    settings = [f"worker.max_attempts={num_kills + 2}"]
    fleet.start("w1", "w2", lease_s=LEASE_S, settings=settings)
    calm = expected("hello", 100_000)
    job = near.submit("hello", model="tiny", max_tokens=100_000)
    wait_until(lambda: job.status().events >= 20)

    seconds = []
    for _ in range(num_kills):
        name, recovery_s = kill_holder(near, admin, fleet, job.id)
        seconds.append(recovery_s)
        fleet.start(name, lease_s=LEASE_S, settings=settings)

    job.cancel()
    tokens = [item.event for item in job.stream(timeout_s=60) if item.seq is not None][:-1]
    assert "".join(event.text for event in tokens) == calm.text[: sum(len(event.text) for event in tokens)]
    seconds.sort()
    p99 = seconds[math.ceil(0.99 * len(seconds)) - 1]
    with capsys.disabled():
        sys.stdout.write(
            f"\n{num_kills} kills, lease {LEASE_S:g} s: p50 {seconds[len(seconds) // 2]:.2f}, p99 {p99:.2f} s\n"
        )
    assert p99 <= LEASE_S + GRACE_S + slack_s


def test_jobs_of_a_lost_worker_do_not_wait_for_those_that_run_elsewhere(near: Client, fleet: ScriptedFleet) -> None:
    """Fault 1 on a busy service: with engines in processes of their own, a lost worker does not make jobs suspects."""
    fleet.start("w1", "w2", slots=4, lease_s=1.0, isolation="child")
    endless = [near.submit("good day", model="tiny", max_tokens=100_000, require_worker=False) for _ in range(5)]
    wait_until(lambda: all(job.status().events >= 5 for job in endless))
    (few, many) = sorted(("w1", "w2"), key=lambda name: sum(job.status().worker == name for job in endless))
    theirs = [job for job in endless if job.status().worker == few]
    others = [job for job in endless if job.status().worker == many]
    assert theirs

    fleet.processes[few].kill()
    free = others.pop()
    free.cancel()

    wait_until(lambda: any(job.status().worker == many for job in theirs))
    resumed = next(job for job in theirs if job.status().worker == many)
    before = {job.id: job.status().events for job in [resumed, *others]}
    wait_until(lambda: all(job.status().events > before[job.id] + 5 for job in [resumed, *others]))


@pytest.mark.parametrize(
    "window",
    [
        "taken=kill",
        "emitted=kill@20",
        "end=kill",
        pytest.param("claimed=kill", marks=pytest.mark.faults),
        pytest.param("emit=kill@20", marks=pytest.mark.faults),
        pytest.param("ended=kill", marks=pytest.mark.faults),
    ],
)
def test_a_worker_that_dies_at_any_step_loses_and_doubles_nothing(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet, window: str
) -> None:
    """Faults 1 and 2: between two steps of taking, emitting and ending; each worker has room for two of the four."""
    fleet.start("w1", slots=2, lease_s=1.0, failpoints=window)
    fleet.start("w2", slots=2, lease_s=1.0)

    jobs = [each.submit(near) for each in CALM]

    assert fleet.processes["w1"].wait(40) == -signal.SIGKILL
    assert_all_as_if_nothing_was(jobs)
    statuses = [job.status() for job in jobs]
    assert {status.attempts for status in statuses} <= {1, 2}
    if window == "taken=kill":
        assert {status.attempts for status in statuses} == {1}, "a message that was lost before its claim costs none"
    wait_until(lambda: not admin.zcard(KEYS.flight("tiny")) and not admin.zcard(KEYS.active))


def test_a_message_lost_on_its_way_is_sent_again_soon(near: Client, admin: redis.Redis, fleet: ScriptedFleet) -> None:
    """Fault 2: taken off the queue, noted nowhere; no worker died, so only the reconciler can know."""
    fleet.start("w1", lease_s=1.0, failpoints="taken=error")
    began = time.monotonic()

    job = CALM[0].submit(near)
    wait_until(lambda: admin.llen(KEYS.queue_list("tiny")) == 0 and near.status(job.id).attempts == 0)

    assert_as_if_nothing_was(job, CALM[0], attempts=1)
    assert time.monotonic() - began < 2.0 + 2.0 + 1.5 + 3 * STALL_S, "quiet time, lock and tick, the answer"
    assert fleet.processes["w1"].poll() is None


@pytest.mark.parametrize("point", ["emit", pytest.param("end", marks=pytest.mark.faults)])
def test_a_worker_that_wakes_up_after_its_lease_writes_nothing(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet, point: str
) -> None:
    """Fault 9: frozen right before it stores tokens or the end, awake when another worker has gone on."""
    fleet.start("w1", slots=2, lease_s=1.0, failpoints=f"{point}=freeze{'@10' if point == 'emit' else ''}")
    fleet.start("w2", slots=2, lease_s=1.0)
    jobs = [each.submit(near) for each in CALM]
    wait_until(lambda: all(job.status().state is JobState.DONE for job in jobs))
    before = {job.id: admin.xrange(KEYS.stream(job.id)) for job in jobs}

    fleet.processes["w1"].send_signal(signal.SIGCONT)

    frozen = [job.id for job in jobs if job.status().attempts == 2]
    assert frozen
    wait_until(lambda: all(f"job={job_id} dropped here" in fleet.log("w1") for job_id in frozen))
    assert {job.id: admin.xrange(KEYS.stream(job.id)) for job in jobs} == before
    assert_all_as_if_nothing_was(jobs)
    assert fleet.processes["w1"].poll() is None


@pytest.mark.parametrize("rounds", [1, pytest.param(4, marks=pytest.mark.faults)])
def test_a_rolling_upgrade_costs_no_attempt(near: Client, fleet: ScriptedFleet, rounds: int) -> None:
    """Fault 8: stop one, start one, next, while jobs run; every stop is quick and by the book."""
    drain_s = 20.0
    fleet.start("w1", "w2", drain_s=drain_s)
    calm = [expected(prompt, 300 * rounds) for prompt in ("hello", "hello again", "good day", "good night")]
    jobs = submit_and_wait(near, calm)

    for number in range(rounds):
        for name in ("w1", "w2"):
            fleet.start(f"{name}-{number}", drain_s=drain_s)
            old = name if number == 0 else f"{name}-{number - 1}"
            began = time.monotonic()
            fleet.processes[old].terminate()
            assert fleet.processes[old].wait(40) == 0
            assert time.monotonic() - began < drain_s

    assert_all_as_if_nothing_was(jobs, calm, attempts=1)
