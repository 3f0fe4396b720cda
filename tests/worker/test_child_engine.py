"""An engine in a process of its own: it serves like one in this process, and dies without the worker."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lamella_engine.errors import EngineClosed, EngineError, SequenceError
from lamella_engine.sequence_types import (
    FinishReason,
    Sampling,
    SequenceEvent,
    SequenceFinished,
    SequenceRequest,
    SequenceTokens,
)
from lamella_worker.child_engine import ChildEngine
from lamella_worker.config import load_config
from lamella_worker.engine_port import EngineAway
from lamella_worker.failpoints import VARIABLE
from lamella_worker.supervisor import EngineSpec
from lamella_worker.worker_error import WorkerError
from tests.waiting import wait_until
from tests.worker.scripted_child import scripted_command
from tests.worker.scripted_engine import scripted_text

ENDLESS = 1_000_000
Opener = Callable[..., "Driven"]


class Driven:
    """A child engine, and a thread that takes its events."""

    def __init__(self, engine: ChildEngine, *, takes: bool = True) -> None:
        self.engine = engine
        self.events: list[SequenceEvent] = []
        self.failure: EngineError | None = None
        self._thread = threading.Thread(target=self._take)
        if takes:
            self._thread.start()

    def submit(self, name: str, prompt: str = "hello", max_tokens: int = 5, generated: Sequence[int] = ()) -> None:
        self.engine.submit(
            SequenceRequest(name, Sampling(max_tokens=max_tokens), prompt=prompt, generated_ids=tuple(generated))
        )

    def text(self, name: str) -> str:
        return "".join(e.text for e in list(self.events) if isinstance(e, SequenceTokens) and e.sequence_id == name)

    def finished(self, name: str) -> SequenceFinished | None:
        found = [e for e in list(self.events) if isinstance(e, SequenceFinished) and e.sequence_id == name]
        assert len(found) <= 1, "a sequence ends once"
        return found[0] if found else None

    def run(self, name: str, prompt: str = "hello", max_tokens: int = 5) -> str:
        self.pid()
        self.submit(name, prompt, max_tokens)
        wait_until(lambda: self.finished(name))
        return self.text(name)

    def pid(self) -> int:
        """The process whose engine is open."""
        wait_until(lambda: self.engine.wait_ready(1.0))
        pid = self.engine.state.pid
        assert pid is not None
        return pid

    def close(self) -> None:
        self.engine.close()
        if self._thread.ident is not None:
            self._thread.join(40)

    def _take(self) -> None:
        try:
            for batch in self.engine.events(poll_s=0.1):
                self.events.extend(batch.events)
        except EngineError as error:
            self.failure = error


class Standing:
    """Whether a figure has stood still for three times the deadline of a hang."""

    def __init__(self, figure: Callable[[], int]) -> None:
        self._figure = figure
        self._last, self._since = -1, 0.0

    def value(self) -> int | None:
        now = self._figure()
        if now != self._last:
            self._last, self._since = now, time.monotonic()
        return now if time.monotonic() - self._since > 1.5 else None


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Open a scripted engine in a child process, with failpoints and settings of the table [worker]."""
    driven: list[Driven] = []

    def make(
        failpoints: str = "",
        *,
        command: Sequence[str] | None = None,
        slots: int = 8,
        sweep_s: float = 0.002,
        takes: bool = True,
        **settings: object,
    ) -> Driven:
        monkeypatch.setenv(VARIABLE, failpoints)
        flags: dict[str, object] = {"worker.model": "tiny", "engine.max_sequences": slots}
        config = load_config(None, flags | {f"worker.{key}": value for key, value in settings.items()}, environ={})
        spec = EngineSpec("tiny", config.engine, "cpu", command or scripted_command(sweep_s))
        driven.append(Driven(ChildEngine.open(spec, config.worker), takes=takes))
        return driven[-1]

    yield make
    for each in driven:
        each.close()
    assert not any(is_alive(each.engine.state.pid) for each in driven)


def is_alive(pid: int | None) -> bool:
    if pid is None:
        return False
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_it_serves_as_an_engine_in_this_process_does(opened: Opener) -> None:
    driven = opened()

    texts = [driven.run(f"s{n}", "hello", 20) for n in range(3)]

    assert texts == [scripted_text("hello", 20)] * 3
    assert driven.engine.facts.max_sequences == 8
    counters = driven.engine.counters()
    assert (counters.tokens, counters.running) == (60, 0)
    assert counters.last_sweep_at is not None
    assert driven.engine.state.restarts == 0


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
    assert driven.engine.state.restarts == 0, "an engine that waits for its consumer is not hung"


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
    assert (driven.engine.state.restarts, driven.engine.state.trouble) == (1, finished.error)


def test_a_process_that_was_killed_from_outside_comes_back_with_half_the_batch_and_others_do_not(
    opened: Opener,
) -> None:
    driven = opened(slots=4)
    sizes = []

    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGKILL, signal.SIGKILL):
        pid = driven.pid()
        os.kill(pid, number)
        wait_until(lambda pid=pid: driven.engine.state.pid not in (pid, None))
        driven.pid()
        sizes.append((driven.engine.facts.max_sequences, driven.engine.state.max_sequences))

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
    assert driven.engine.state.restarts == 1
    assert driven.engine.facts.max_sequences == 8, "a hang says nothing of memory"


def test_an_engine_whose_device_is_lost_is_opened_anew(opened: Opener) -> None:
    driven = opened("sweep=device@5#0")
    driven.submit("a", max_tokens=ENDLESS)

    finished = wait_until(lambda: driven.finished("a"))

    assert "illegal memory access" in (finished.error or "")
    wait_until(lambda: driven.engine.state.restarts == 1)
    assert driven.run("b") == scripted_text("hello", 5)
    assert "the device failed and is lost" in (driven.engine.state.trouble or "")


def test_an_engine_whose_sweeps_fail_now_and_then_stays_and_one_that_only_fails_is_opened_anew(opened: Opener) -> None:
    driven = opened("sweep=error@1#0;sweep=error@2#0;sweep=error@10#0;sweep=error@11#0;sweep=error@12#0")

    for name in ("a", "b"):
        driven.run(name)
    assert driven.run("c") == scripted_text("hello", 5)
    assert driven.engine.state.restarts == 0
    for name in ("d", "e", "f"):
        driven.run(name)

    wait_until(lambda: driven.engine.state.restarts == 1)
    assert "3 sweeps in a row failed" in (driven.engine.state.trouble or "")


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
    wait_until(lambda: not driven.engine.wait_ready(0.01))

    with pytest.raises(EngineAway):
        driven.submit("a")

    driven.pid()
    assert "opening the model did not get on" in (driven.engine.state.trouble or "")
    assert driven.engine.state.restarts == 2
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
    assert driven.engine.state.has_failed
    assert not driven.engine.wait_ready(0.1)
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


def test_closing_ends_the_process_and_is_harmless_when_repeated(opened: Opener) -> None:
    driven = opened()
    driven.submit("a", max_tokens=ENDLESS)
    pid = driven.pid()

    driven.close()
    driven.close()

    assert not is_alive(pid)
    assert driven.finished("a") is None
    for use in (lambda: driven.submit("b"), lambda: driven.engine.cancel("a")):
        with pytest.raises(EngineClosed):
            use()


def test_closing_does_not_wait_for_a_process_that_hangs(opened: Opener) -> None:
    driven = opened("sweep=freeze@5", drain_s=2.0)
    driven.submit("a", max_tokens=ENDLESS)
    pid = driven.pid()
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    began = time.monotonic()
    driven.close()

    assert time.monotonic() - began < 10
    assert not is_alive(pid)


def test_signals_that_stop_a_service_are_left_to_the_worker(opened: Opener) -> None:
    driven = opened()
    driven.submit("a", max_tokens=ENDLESS)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(driven.pid(), number)
    length = len(driven.text("a"))

    wait_until(lambda: len(driven.text("a")) > length + 100)
    assert driven.engine.state.restarts == 0


def test_the_process_does_not_learn_the_servers_password(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMELLA_REDIS_URL", "redis://:secret@somewhere/0")

    driven = opened()

    assert b"secret" not in Path(f"/proc/{driven.pid()}/environ").read_bytes()
    assert b"secret" not in Path(f"/proc/{driven.pid()}/cmdline").read_bytes()


@pytest.mark.parametrize("state", ["serving", "frozen", "opening"])
def test_the_process_dies_with_the_worker_whatever_it_does(tmp_path: Path, state: str) -> None:
    program = textwrap.dedent("""
        import sys, threading
        from lamella_worker.config import load_config
        from lamella_worker.child_engine import ChildEngine
        from lamella_worker.supervisor import EngineSpec
        from tests.worker.scripted_child import scripted_command

        config = load_config(None, {"worker.model": "tiny"}, environ={})
        engine = ChildEngine(EngineSpec("tiny", config.engine, "cpu", scripted_command()), config.worker)
        engine._supervisor.start()
        while sys.argv[1] != "opening" and not engine.wait_ready(1.0): pass
        while engine.state.pid is None: pass
        print(engine.state.pid, flush=True)
        threading.Event().wait(100)
    """)
    failpoints = "open=hang" if state == "opening" else ""
    with subprocess.Popen(
        [sys.executable, "-c", program, state],
        stdout=subprocess.PIPE,
        env={**os.environ, VARIABLE: failpoints},
        cwd=Path(__file__).resolve().parent.parent.parent,
    ) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        wait_until(lambda: b"scripted_child" in Path(f"/proc/{pid}/cmdline").read_bytes())
        if state == "frozen":
            os.kill(pid, signal.SIGSTOP)

        worker.kill()

        wait_until(lambda: not is_alive(pid))
