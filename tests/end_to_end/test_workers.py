"""Workers that come and go under their jobs: the stream goes on, each event once, the text as if nothing was."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella.messages import Done, JobState
from tests.end_to_end.conftest import PAIR
from tests.end_to_end.fleet import DRAIN_S, Fleet, run_worker
from tests.waiting import wait_until

LONG = 300
GREEDY = {"max_tokens": LONG, "ignore_eos": True}
SAMPLED = {**GREEDY, "temperature": 0.8, "seed": 11}


def test_a_killed_workers_job_goes_on_elsewhere_with_the_same_text(
    client: Client, fleet: Fleet, pair: list[str]
) -> None:
    undisturbed = client.generate("The river runs", model=PAIR, timeout_s=60, **SAMPLED)
    job = client.submit("The river runs", model=PAIR, **SAMPLED)
    items = []

    for item in job.stream(timeout_s=60):
        items.append(item)
        if item.seq == 30:
            holder = job.status().worker
            assert holder in pair
            fleet.signal(holder, signal.SIGKILL)

    assert [item.seq for item in items if item.seq is not None] == list(range(1, LONG + 2))
    assert isinstance(items[-1].event, Done)
    status = job.status()
    assert (status.attempts, status.state) == (2, JobState.DONE)
    assert status.worker != holder
    assert job.result(timeout_s=40).token_ids == undisturbed.token_ids
    assert job.result(timeout_s=40).text == undisturbed.text


def test_a_drained_workers_jobs_go_on_elsewhere_with_their_attempts_unchanged(
    client: Client, fleet: Fleet, pair: list[str]
) -> None:
    prompts = [f"Chapter {number}." for number in range(6)]
    calm = [client.submit(prompt, model=PAIR, **GREEDY) for prompt in prompts]
    undisturbed = [job.result(timeout_s=60).text for job in calm]
    jobs = [client.submit(prompt, model=PAIR, **GREEDY) for prompt in prompts]
    wait_until(lambda: all(job.status().events > 5 for job in jobs))
    holders = [job.status().worker for job in jobs]
    drained = max(pair, key=holders.count)
    moved = [job for job, holder in zip(jobs, holders, strict=True) if holder == drained]

    began = time.monotonic()
    fleet.signal(drained, signal.SIGTERM)
    exit_code = fleet.wait(drained, 40.0)

    assert exit_code == 0
    assert time.monotonic() - began < DRAIN_S / 2
    assert len(moved) >= 2
    assert [job.result(timeout_s=60).text for job in jobs] == undisturbed
    assert [job.status().attempts for job in jobs] == [1] * len(jobs)
    assert any(job.status().worker != drained for job in moved)
    assert drained not in {worker.name for worker in client.workers()}


def test_a_worker_that_cannot_serve_says_why_and_takes_nothing(
    session_server: EmbeddedServer, tiny_store: Path, tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"
    arguments = ["--model", "no-such-model", "--redis-url", session_server.url, "--store", str(tiny_store)]

    process = run_worker([*arguments, "--device", "cpu"], log)

    assert process.wait(60) == 1
    said = log.read_text()
    assert "error: cannot serve no-such-model" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--slots", "0"], "option --slots: engine.max_sequences = 0"),
        (["--device", "cuda:7"], "cuda:7 does not exist here"),
        (["--model", "../x"], "is not a model name"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_anything_is_loaded(
    tmp_path: Path, options: list[str], said: str
) -> None:
    log = tmp_path / "worker.log"

    process = run_worker(["--model", "any", *options], log)

    assert process.wait(30) == 2
    assert said in log.read_text()
    assert "Traceback" not in log.read_text()


def test_health_follows_the_worker(client: Client, fleet: Fleet, pair: list[str], tmp_path: Path) -> None:
    url = fleet.url

    alive = run_worker(["health", "--redis-url", url, "--name", pair[0]], tmp_path / "alive.log", is_offline=False)
    dead = run_worker(["health", "--redis-url", url, "--name", "nobody"], tmp_path / "dead.log", is_offline=False)

    assert alive.wait(30) == 0
    assert dead.wait(30) == 1
    assert "no heartbeat of worker nobody" in (tmp_path / "dead.log").read_text()
