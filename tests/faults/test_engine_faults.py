"""Faults of a real engine: it crashes, or its memory is short; the worker lives, and every text is what it would be."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lamella.client import Client
from lamella.messages import EngineProcessInfo
from tests.faults.conftest import MODEL
from tests.faults.oracle import Undisturbed, assert_as_if_nothing_was, undisturbed
from tests.faults.workers import Workers
from tests.waiting import wait_until

NAME = "w1"
HOG = "A hog of memory"
FAILPOINTS = f"sweep=slow@1+;sweep=oom@5~{HOG};sweep=oom@20~{HOG}"
PROMPTS = ["The river runs", "A small lamp stood on the table", "One, two, three"]
SAMPLED = {"max_tokens": 300, "temperature": 0.8, "seed": 11}


@pytest.fixture(scope="module")
def calm(workers: Workers) -> list[Undisturbed]:
    """The requests of these tests, and what becomes of them in peace; the memory is short when the HOG has come.

    The sweeps are slow: no request is at its end when the fault comes, however late the test gets to cause it. Side by
    side they take a third of the sweeps that they take one after the other, and their texts are the same.
    """
    workers.start(MODEL, NAME, failpoints=FAILPOINTS)
    with Client(workers.url) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: undisturbed(client, MODEL, prompt, **SAMPLED), PROMPTS))


@pytest.fixture
def engine(workers: Workers, calm: list[Undisturbed]) -> EngineProcessInfo:
    workers.start(MODEL, NAME, failpoints=FAILPOINTS)
    return workers.engine(NAME)


@pytest.fixture
def engine_for_this_test(workers: Workers, engine: EngineProcessInfo) -> Iterator[EngineProcessInfo]:
    yield engine
    workers.stop(NAME)


def test_a_crash_of_the_engine_costs_an_attempt_and_nothing_else(
    client: Client, workers: Workers, engine: EngineProcessInfo, calm: list[Undisturbed]
) -> None:
    """Fault 3."""
    jobs = [each.submit(client) for each in calm]
    wait_until(lambda: all(job.status().events >= 10 for job in jobs))

    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSEGV)

    for job, expected in zip(jobs, calm, strict=True):
        assert_as_if_nothing_was(job, expected, attempts=2)
        assert job.status().worker == NAME
    after = workers.engine(NAME)
    assert after.pid != engine.pid
    assert (after.restarts, after.max_sequences) == (engine.restarts + 1, engine.max_sequences)
    assert "killed by SIGSEGV" in (after.trouble or "")


def test_a_sweep_without_memory_sends_the_youngest_back_and_harms_nobody(
    client: Client, workers: Workers, engine_for_this_test: EngineProcessInfo, calm: list[Undisturbed]
) -> None:
    """Fault 6. Fewer run side by side afterwards, for a thousand sweeps: this engine is not left to the next test."""
    told = workers.log(NAME).count("out of memory: the youngest waits")
    jobs = [each.submit(client) for each in calm]
    wait_until(lambda: all(job.status().events >= 5 for job in jobs))

    hog = client.submit(HOG, model=MODEL, max_tokens=40, ignore_eos=True)

    for job, expected in zip(jobs, calm, strict=True):
        assert_as_if_nothing_was(job, expected, attempts=1)
    assert hog.result(timeout_s=40).usage.completion_tokens == 40
    assert workers.log(NAME).count("out of memory: the youngest waits") == told + 2
    assert workers.engine(NAME).restarts == engine_for_this_test.restarts
    info = wait_until(lambda: workers.info(NAME))
    assert info.slots < engine_for_this_test.max_sequences, "fewer run side by side for a while, and it says so"


def test_the_worker_itself_never_loads_torch(workers: Workers, engine: EngineProcessInfo) -> None:
    def libraries(pid: int) -> str:
        return Path(f"/proc/{pid}/maps").read_text()

    assert engine.pid is not None
    assert "libtorch" in libraries(engine.pid)
    assert "libtorch" not in libraries(workers.pid(NAME))
    assert b"CUDA_VISIBLE_DEVICES=\0" in Path(f"/proc/{engine.pid}/environ").read_bytes()
