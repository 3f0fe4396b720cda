"""An engine in a process of its own: it serves like one in this process, and dies without the worker."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from lamella_engine.errors import SequenceError
from lamella_engine.sequence_types import (
    FinishReason,
    SequenceTokens,
)
from lamella_worker.engine_port import EngineAway
from lamella_worker.worker_error import WorkerError
from tests.waiting import wait_until
from tests.worker.driven_engine import Opener, Standing
from tests.worker.scripted_engine import scripted_text

ENDLESS = 1_000_000


def test_it_serves_as_an_engine_in_this_process_does(opened: Opener) -> None:
    driven = opened()

    texts = [driven.run(f"s{n}", "hello", 20) for n in range(3)]

    assert texts == [scripted_text("hello", 20)] * 3
    assert driven.engine.facts.max_sequences == 8
    counters = driven.engine.counters()
    assert (counters.tokens, counters.running) == (60, 0)
    assert counters.last_sweep_at is not None
    assert driven.host.state.restarts == 0


def test_a_sequence_that_the_engine_refuses_is_refused_with_its_code(opened: Opener) -> None:
    driven = opened()

    with pytest.raises(SequenceError, match="shorten it") as caught:
        driven.submit("a", "bad prompt")

    assert caught.value.code == "prompt_too_long"
    assert driven.run("b") == scripted_text("hello", 5)


def test_cancel_ends_a_sequence_and_an_unknown_one_is_ignored(opened: Opener) -> None:
    driven = opened()
    driven.submit("a", max_tokens=ENDLESS)
    wait_until(lambda: driven.text("a"))

    driven.engine.cancel("nobody")
    driven.engine.cancel("a")

    finished = wait_until(lambda: driven.finished("a"))
    assert finished.reason is FinishReason.CANCELLED
    wait_until(lambda: driven.engine.counters().running == 0)


def test_events_that_nobody_takes_stall_the_sweeps_and_are_not_lost(opened: Opener) -> None:
    driven = opened(takes=False, hang_s=0.5, hang_sweeps=2.0)
    driven.submit("a", max_tokens=200)
    stands = Standing(lambda: driven.engine.counters().sweeps)
    seen = wait_until(stands.value)

    for batch in driven.engine.events(0.1):
        driven.events.extend(batch.events)
        if driven.finished("a"):
            break

    assert 0 < seen < 20
    assert driven.text("a") == scripted_text("hello", 200)
    assert driven.host.state.restarts == 0, "an engine that waits for its consumer is not hung"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_dies_ends_its_sequences_after_their_events_and_another_takes_over(
    opened: Opener, number: signal.Signals
) -> None:
    driven = opened()
    for name in ("a", "b"):
        driven.submit(name, max_tokens=ENDLESS)
    wait_until(lambda: len(driven.text("a")) > 50)
    first = driven.pid()

    os.kill(first, number)

    for name in ("a", "b"):
        finished = wait_until(lambda name=name: driven.finished(name))
        assert (finished.reason, finished.error_code) == (FinishReason.ERROR, "engine")
        assert number.name in (finished.error or "")
        assert isinstance(driven.events[-3], SequenceTokens)
        num_tokens = driven.text(name).count(" ")
        assert driven.text(name) == scripted_text("hello", num_tokens)
    before = driven.engine.counters()
    assert driven.pid() != first
    assert driven.run("c") == scripted_text("hello", 5)
    after = driven.engine.counters()
    assert after.tokens == before.tokens + 5, "totals go on"
    assert (driven.host.state.restarts, driven.host.state.trouble) == (1, finished.error)


def test_a_process_that_was_killed_from_outside_comes_back_with_half_the_batch_and_others_do_not(
    opened: Opener,
) -> None:
    driven = opened(slots=4)
    sizes = []

    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGKILL, signal.SIGKILL):
        pid = driven.pid()
        os.kill(pid, number)
        wait_until(lambda pid=pid: driven.host.state.pid not in (pid, None))
        driven.pid()
        sizes.append((driven.engine.facts.max_sequences, driven.host.state.max_sequences))

    assert sizes == [(2, 2), (2, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize("fault", ["hang", "freeze"])
def test_a_process_that_hangs_in_a_sweep_is_killed_and_another_takes_over(opened: Opener, fault: str) -> None:
    driven = opened(f"sweep={fault}@20#0", hang_s=1.0, hang_sweeps=2.0)
    began = time.monotonic()
    driven.submit("a", max_tokens=ENDLESS)

    finished = wait_until(lambda: driven.finished("a"))
    text = driven.run("b")

    assert "hung" in (finished.error or "")
    assert time.monotonic() - began < 30
    assert text == scripted_text("hello", 5)
    assert driven.host.state.restarts == 1
    assert driven.engine.facts.max_sequences == 8, "a hang says nothing of memory"


def test_an_engine_whose_device_is_lost_is_opened_anew(opened: Opener) -> None:
    driven = opened("sweep=device@5#0")
    driven.submit("a", max_tokens=ENDLESS)

    finished = wait_until(lambda: driven.finished("a"))

    assert "illegal memory access" in (finished.error or "")
    wait_until(lambda: driven.host.state.restarts == 1)
    assert driven.run("b") == scripted_text("hello", 5)
    assert "the device failed and is lost" in (driven.host.state.trouble or "")


def test_an_engine_whose_sweeps_fail_now_and_then_stays_and_one_that_only_fails_is_opened_anew(opened: Opener) -> None:
    driven = opened("sweep=error@1#0;sweep=error@2#0;sweep=error@10#0;sweep=error@11#0;sweep=error@12#0")

    for name in ("a", "b"):
        driven.run(name)
    assert driven.run("c") == scripted_text("hello", 5)
    assert driven.host.state.restarts == 0
    for name in ("d", "e", "f"):
        driven.run(name)

    wait_until(lambda: driven.host.state.restarts == 1)
    assert "3 sweeps in a row failed" in (driven.host.state.trouble or "")


def test_a_process_that_dies_while_it_looks_at_a_sequence_fails_that_one(opened: Opener) -> None:
    driven = opened("submit=segfault~poison")

    with pytest.raises(SequenceError, match="SIGSEGV") as caught:
        driven.submit("a", "poison")

    assert caught.value.code == "engine"
    assert driven.finished("a") is None, "told once"
    driven.pid()
    assert driven.run("b") == scripted_text("hello", 5)


def test_while_no_engine_is_open_a_sequence_is_not_looked_at(opened: Opener) -> None:
    driven = opened("open=hang#1", open_s=3.0)
    os.kill(driven.pid(), signal.SIGSEGV)
    wait_until(lambda: not driven.host.wait_ready(0.01))

    with pytest.raises(EngineAway):
        driven.submit("a")

    driven.pid()
    assert "opening the model did not get on" in (driven.host.state.trouble or "")
    assert driven.host.state.restarts == 2
    assert driven.run("a") == scripted_text("hello", 5)


def test_too_many_restarts_end_the_events_with_the_reason(opened: Opener) -> None:
    driven = opened("submit=exit", max_restarts=2)

    for n in range(3):
        driven.pid()
        with pytest.raises(SequenceError, match="exit code 3"):
            driven.submit(str(n))

    failure = wait_until(lambda: driven.failure)
    assert "ended 3 times within 600 s and is not started again" in str(failure)
    assert "exit code 3" in str(failure)
    assert driven.host.state.has_failed
    assert not driven.host.wait_ready(0.1)
    with pytest.raises(EngineAway):
        driven.submit("late")


def test_a_first_engine_that_cannot_open_says_why_and_leaves_nothing(opened: Opener) -> None:
    with pytest.raises(WorkerError, match="names 'open=nonsense'"):
        opened("open=nonsense")
    with pytest.raises(WorkerError, match="ended with exit code 3"):
        opened("open=exit")


def test_a_first_engine_without_memory_is_tried_with_less(opened: Opener) -> None:
    driven = opened("open=oom#0;open=kill#1")

    assert driven.engine.facts.max_sequences == 2
    assert driven.run("a") == scripted_text("hello", 5)


def test_a_program_that_speaks_nonsense_is_not_trusted(opened: Opener) -> None:
    junk = "import os, sys, time; os.write(int(sys.argv[1]), b'\\0\\0\\0\\4junk'); time.sleep(60)"

    with pytest.raises(WorkerError, match="is not started again"):
        opened(command=(sys.executable, "-c", junk), max_restarts=0)
