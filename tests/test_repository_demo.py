"""`make demo`, run as its users run it, on a store that already has the model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fixtures.servers import require_embedded
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def demo_directory(tmp_path: Path, smollm2_store: Path) -> Path:
    """A demo's directory as a first run leaves it."""
    require_embedded()
    (tmp_path / "shards").symlink_to(smollm2_store, target_is_directory=True)
    return tmp_path


@contextmanager
def _demo(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tools.demo", "--directory", str(directory), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "LAMELLA_DEMO_PROMPT"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _processes_of(directory: Path) -> str:
    """Command lines of live processes that work in the directory."""
    listing = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, timeout=40, check=True)
    return "\n".join(line for line in listing.stdout.splitlines() if str(directory) in line)


@pytest.mark.real_model
def test_demo_answers_and_reports_and_leaves_nothing_running(demo_directory: Path) -> None:
    with _demo(demo_directory) as process:
        answer, report = process.communicate(timeout=110)

    assert process.returncode == 0, report
    assert "Paris" in answer
    for figure in (r"[\d.]+ tokens/s", r"sweeps +\d+", r"streamed [\d.]+ MB of weights a token", r"memory +[\d.]+ MB"):
        assert re.search(figure, report), report
    assert _processes_of(demo_directory) == ""


@pytest.mark.real_model
def test_demo_fails_with_one_message_and_leaves_nothing_running(demo_directory: Path) -> None:
    with _demo(demo_directory, "too long " * 10_000) as process:
        answer, report = process.communicate(timeout=110)

    assert process.returncode == 1
    assert answer == ""
    assert re.match(r"error: job \w+ failed \(prompt_too_long\)", report.splitlines()[-1])
    assert "Traceback" not in report
    assert _processes_of(demo_directory) == ""


@pytest.mark.real_model
def test_interrupted_demo_leaves_nothing_running(demo_directory: Path) -> None:
    with _demo(demo_directory, "Tell a very long story.", "--max-tokens", "4000") as process:
        wait_until(lambda: "lamella_worker" in _processes_of(demo_directory), deadline_s=60)

        process.send_signal(signal.SIGTERM)
        _, report = process.communicate(timeout=60)

    assert process.returncode == 130, report
    assert "everything that was started is stopped" in report
    assert _processes_of(demo_directory) == ""


def test_empty_question_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with _demo(tmp_path, " ") as process:
        answer, report = process.communicate(timeout=60)

    assert process.returncode == 1
    assert (answer, report) == ("", 'error: the question is empty; ask one: make demo PROMPT="..."\n')
    assert list(tmp_path.iterdir()) == []
