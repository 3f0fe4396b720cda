"""How an engine process ends: closed, hung, with the worker, and not by what stops a service."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lamella_engine.errors import EngineClosed
from lamella_worker.failpoints import VARIABLE
from tests.waiting import wait_until
from tests.worker.driven_engine import Opener, is_alive

ENDLESS = 1_000_000


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

    assert time.monotonic() - began < 40
    assert not is_alive(pid)


def test_signals_that_stop_a_service_are_left_to_the_worker(opened: Opener) -> None:
    driven = opened()
    driven.submit("a", max_tokens=ENDLESS)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(driven.pid(), number)
    length = len(driven.text("a"))

    wait_until(lambda: len(driven.text("a")) > length + 100)
    assert driven.host.state.restarts == 0


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
        from lamella_worker.child_host import ChildHost
        from lamella_worker.engine_port import ServedModel
        from lamella_worker.supervisor import EngineSpec
        from tests.worker.scripted_child import scripted_command

        config = load_config(None, {"worker.model": "tiny"}, environ={})
        models = (ServedModel("tiny", "tiny"),)
        engine = ChildHost(EngineSpec(models, config.engine, "cpu", scripted_command()), config.worker)
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
