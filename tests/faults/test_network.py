"""The network between workers, clients and server: partitions, half-open connections, cuts, delays, slow readers."""

from __future__ import annotations

import time
from contextlib import closing

import pytest
import redis

from lamella.client import Client
from lamella.keys import Keys
from lamella.messages import JobState, Progress
from tests.faults.oracle import assert_as_if_nothing_was
from tests.faults.scripted_jobs import CALM, assert_all_as_if_nothing_was, expected, submit_and_wait
from tests.faults.tcp_proxy import TcpProxy
from tests.waiting import wait_until
from tests.worker.scripted_engine import scripted_text
from tests.worker.scripted_fleet import ScriptedFleet

KEYS = Keys()
LONG = [expected(prompt, 400) for prompt in ("hello", "hello again")]


def wait_s(seconds: float) -> None:
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > seconds)


def test_a_worker_that_is_cut_off_fences_itself_and_comes_back(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet, proxy: TcpProxy
) -> None:
    """Fault 15: nothing gets through and nobody is told; the job moves on, and late packets change nothing."""
    fleet.start("w1", lease_s=1.5, url=proxy.url)
    jobs = submit_and_wait(near, LONG)
    fleet.start("w2", lease_s=1.5)

    proxy.partition()
    wait_until(lambda: all(job.status().worker == "w2" for job in jobs))
    wait_until(lambda: "leases of 2 jobs are not renewed" in fleet.log("w1"))
    proxy.heal()

    wait_until(lambda: fleet.log("w1").count("dropped here: its claim is void") == 2)
    assert_all_as_if_nothing_was(jobs, LONG, attempts=2)
    fleet.processes["w2"].terminate()
    assert fleet.processes["w2"].wait(40) == 0
    assert_as_if_nothing_was(CALM[0].submit(near), CALM[0])
    assert fleet.processes["w1"].poll() is None


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_a_half_open_connection_is_noticed_within_51_seconds(
    near: Client, fleet: ScriptedFleet, proxy: TcpProxy
) -> None:
    """Fault 15: connections that a router forgot; the worker has no sign of it but silence. No other worker helps."""
    fleet.start("w1", lease_s=1.5, url=proxy.url)
    jobs = submit_and_wait(near, LONG)

    proxy.strand()
    began = time.monotonic()
    late = CALM[0].submit(near)

    wait_until(lambda: late.status().state is not JobState.QUEUED, 60.0)
    noticed_s = time.monotonic() - began
    assert_as_if_nothing_was(late, CALM[0])
    assert_all_as_if_nothing_was(jobs, LONG)
    assert noticed_s <= 51.0


def test_a_client_notices_a_half_open_connection_and_reads_on(
    near: Client, fleet: ScriptedFleet, proxy: TcpProxy
) -> None:
    """Fault 15 on the client's side: within a second of silence and its socket's timeout."""
    fleet.start("w1")
    job = LONG[0].submit(near)
    with Client(proxy.url) as far, closing(far.job(job.id).stream(timeout_s=60)) as stream:
        seen = [next(stream).seq for _ in range(20)]

        proxy.strand()
        began = time.monotonic()
        seen.append(next(item.seq for item in stream if item.seq == 21))
        assert time.monotonic() - began < 30.0
        seen.extend(item.seq for item in stream)

    assert seen == list(range(1, len(LONG[0].token_ids) + 2))
    assert_as_if_nothing_was(job, LONG[0], attempts=1)


@pytest.mark.parametrize("num_cuts", [3, pytest.param(30, marks=pytest.mark.faults)])
def test_connections_that_are_cut_again_and_again_lose_nothing(
    near: Client, fleet: ScriptedFleet, proxy: TcpProxy, num_cuts: int
) -> None:
    """Faults 14 and 15: the worker's and the reader's connections at once; answers are lost with them."""
    calm = [expected(prompt, 100 + 100 * num_cuts) for prompt in ("hello", "hello again")]
    fleet.start("w1", lease_s=1.5, url=proxy.url)
    jobs = submit_and_wait(near, calm)
    with Client(proxy.url) as far, closing(far.job(jobs[0].id).stream(timeout_s=90)) as stream:
        seen = []
        for _ in range(num_cuts):
            seen.extend(next(stream).seq for _ in range(20))
            proxy.cut()
        seen.extend(item.seq for item in stream)

    assert seen == list(range(1, len(calm[0].token_ids) + 2))
    assert_all_as_if_nothing_was(jobs, calm)
    assert fleet.processes["w1"].poll() is None


def test_a_claim_and_an_end_whose_answers_were_lost_count_once(
    near: Client, fleet: ScriptedFleet, proxy: TcpProxy
) -> None:
    """Fault 14: the server did it and the worker never heard."""
    fleet.start("w1", lease_s=1.5, url=proxy.url)
    assert_as_if_nothing_was(CALM[1].submit(near), CALM[1])
    proxy.lose_next_answer_to(b'"type":"done"')
    ended = CALM[0].submit(near)
    assert_as_if_nothing_was(ended, CALM[0], attempts=1)
    wait_until(lambda: proxy.lost == 1)

    claimed = CALM[2].submit(near)
    proxy.lose_next_answer_to(b"attempts_exhausted")  # the claim carries the event of a job that is out of attempts

    assert_as_if_nothing_was(claimed, CALM[2])
    assert_as_if_nothing_was(CALM[3].submit(near), CALM[3])
    wait_until(lambda: proxy.lost == 2)


@pytest.mark.faults
def test_a_slow_network_slows_jobs_down_and_nothing_else(near: Client, fleet: ScriptedFleet, proxy: TcpProxy) -> None:
    """Fault 15, less of it: 100 ms each way, several round trips in every third of the lease."""
    calm = [expected(prompt, 30) for prompt in ("hello", "hello again")]
    proxy.delay(0.1)
    fleet.start("w1", lease_s=2.0, url=proxy.url)

    jobs = [each.submit(near) for each in calm]

    assert_all_as_if_nothing_was(jobs, calm, attempts=1)


def test_a_reader_that_is_too_slow_is_dropped_by_the_server_and_heals(
    near: Client, admin: redis.Redis, fleet: ScriptedFleet
) -> None:
    """Fault 22: it falls behind further than the server keeps for it; the engine does not wait for it."""
    fleet.start("w1")
    admin.config_set("client-output-buffer-limit", "pubsub 64kb 32kb 1")
    job = LONG[0].submit(near)
    channel = KEYS.channel(job.id)
    noise = "- " + Progress(prefilled_tokens=1, prompt_tokens=1).model_dump_json()
    with closing(job.stream(timeout_s=60)) as stream:
        seen = [next(stream).seq for _ in range(5)]

        def flood() -> bool:
            with admin.pipeline(transaction=False) as pipe:
                for _ in range(5000):
                    pipe.publish(channel, noise)
                pipe.execute()
            return not dict(admin.pubsub_numsub(channel)).get(channel)

        wait_until(flood)
        wait_until(lambda: job.status().state is JobState.DONE)
        seen.extend(item.seq for item in stream if item.seq is not None)

    assert [seq for seq in seen if seq is not None] == list(range(1, len(LONG[0].token_ids) + 2))
    assert_as_if_nothing_was(job, LONG[0], attempts=1)
    assert near.generate("after", model="tiny", max_tokens=3, timeout_s=40).text == scripted_text("after", 3)
