"""The server's memory is full for a while: a clean refusal for clients, a stall for jobs, and nothing wedged."""

from __future__ import annotations

import signal
import time

import pytest
import redis

from lamella.client import Client
from lamella.errors import ServerRefused
from lamella.keys import Keys
from lamella.messages import JobState
from tests.faults.oracle import assert_as_if_nothing_was
from tests.faults.scripted_jobs import CALM, assert_all_as_if_nothing_was, expected
from tests.waiting import wait_until
from tests.worker.scripted_fleet import ScriptedFleet

KEYS = Keys()
LONG = [expected(prompt, 150) for prompt in ("hello", "hello again", "good day", "good night", "sleep well")]


def wait_s(seconds: float) -> None:
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > seconds)


@pytest.mark.parametrize("full_s", [2.5, pytest.param(20.0, marks=pytest.mark.faults)])
def test_a_full_server_refuses_submits_stalls_jobs_and_goes_on(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet, full_s: float
) -> None:
    """Fault 12: also for longer than the lease, so that leases run out; the worker is the one that goes on."""
    fleet.start("w1", slots=2, lease_s=1.0)
    jobs = [each.submit(near) for each in LONG]
    wait_until(lambda: sum(job.status().events >= 20 for job in jobs) == 2)

    admin.config_set("maxmemory", "1mb")
    wait_until(lambda: "Redis does not take events" in fleet.log("w1"))
    with pytest.raises(ServerRefused, match="its memory is full, so nothing was stored"):
        near.submit("hello", model="tiny", require_worker=False)
    stalled = [job.status().events for job in jobs]
    wait_s(full_s)
    assert [job.status().events for job in jobs] == stalled
    admin.config_set("maxmemory", "0")

    assert_all_as_if_nothing_was(jobs, LONG)
    more = [calm.submit(near) for calm in CALM]  # more than there are slots: none is wedged
    assert_all_as_if_nothing_was(more, attempts=1)
    assert fleet.processes["w1"].poll() is None


def test_a_message_taken_while_the_server_is_full_is_not_lost(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet
) -> None:
    """Faults 2 and 12: it left its queue for a worker that cannot note it anywhere."""
    fleet.start("w1", lease_s=1.0)
    assert_as_if_nothing_was(CALM[1].submit(near), CALM[1])
    fleet.processes["w1"].send_signal(signal.SIGSTOP)
    job = CALM[0].submit(near)
    wait_until(lambda: admin.llen(KEYS.queue_list("tiny")) == 0)

    admin.config_set("maxmemory", "1mb")
    fleet.processes["w1"].send_signal(signal.SIGCONT)
    wait_until(lambda: "command not allowed when used memory" in fleet.log("w1"))
    assert job.status().state is JobState.QUEUED
    wait_s(2.0)
    admin.config_set("maxmemory", "0")

    assert_as_if_nothing_was(job, CALM[0], attempts=1)
    assert fleet.processes["w1"].poll() is None
