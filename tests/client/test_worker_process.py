"""A worker's process under watch: started again when it dies, given up when it dies again and again."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lamella.cli import worker_process
from lamella.cli.worker_process import WorkerProcess, WorkerSpec, drain_all, how_it_ended
from lamella.errors import LamellaError
from tests.waiting import wait_until


@dataclass(frozen=True)
class ScriptSpec(WorkerSpec):
    """A child of the same kind that runs a script instead of a worker."""

    script: str = ""

    def command(self) -> list[str]:
        return [sys.executable, "-I", "-c", self.script]


def process(script: str) -> WorkerProcess:
    return WorkerProcess(ScriptSpec("unix:///x", "m", "cpu", script=script))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "FIRST_PAUSE_S", 0.01)


def test_the_command_names_what_was_given_and_hides_the_url() -> None:
    spec = WorkerSpec("redis://:geheim@h/0", "owner/name", "cuda:1", "/store", 4, "4GiB", "80%")

    command = spec.command()

    assert command[1:] == [
        *("-m", "lamella_worker", "--model", "owner/name", "--device", "cuda:1"),
        *("--store", "/store", "--slots", "4", "--vram", "4GiB", "--ram", "80%"),
    ]
    assert "geheim" not in " ".join(command)


def test_a_worker_that_dies_is_started_again(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    worker = process(
        f"import os, time; open({str(marks)!r}, 'a').write('x'); "
        f"time.sleep(60) if os.path.getsize({str(marks)!r}) > 1 else os._exit(1)"
    )
    worker.start()

    news = wait_until(worker.look)
    again = wait_until(worker.look)

    assert "exit code 1" in news
    assert "started again" in again
    assert worker.restarts == 1
    assert drain_all([worker], 10.0)


def test_a_worker_that_dies_again_and_again_is_given_up() -> None:
    worker = process("raise SystemExit(1)")
    worker.start()

    with pytest.raises(LamellaError, match="5 times in a row"):
        wait_until(lambda: worker.look() and False)


def test_settings_that_cannot_work_are_given_up_at_once() -> None:
    worker = process("raise SystemExit(2)")
    worker.start()

    with pytest.raises(LamellaError, match="these settings"):
        wait_until(lambda: worker.look() and False)


def test_a_worker_that_does_not_drain_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    worker = process(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"open({str(ready)!r}, 'w').close(); time.sleep(60)"
    )
    worker.start()
    wait_until(ready.exists)
    started = time.monotonic()

    assert not drain_all([worker], 0.2)
    assert time.monotonic() - started < 30.0
    assert worker.pid is None


def test_a_worker_gets_the_url_in_its_environment(tmp_path: Path) -> None:
    out = tmp_path / "url"
    worker = process(f"import os; open({str(out)!r}, 'w').write(os.environ['LAMELLA_REDIS_URL'])")

    worker.start()
    wait_until(lambda: worker.exit_code() is not None)

    assert out.read_text() == "unix:///x"


def test_ends_are_told_in_words() -> None:
    assert how_it_ended(3) == "exit code 3"
    assert how_it_ended(-9) == "killed by SIGKILL"
    assert how_it_ended(-99) == "killed by signal 99"
