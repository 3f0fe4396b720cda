"""`tools.second_run`, on suites of a few lines: what may be unsteady, and what fails the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UNSTEADY = """
from pathlib import Path
seen = Path(__file__).with_name("seen")
def test_unsteady():
    again = seen.exists()
    seen.write_text("")
    assert again
"""
BROKEN = "def test_broken():\n    assert False\n"
MANY = "import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_many(n):\n    assert False\n"
FINE = "def test_fine():\n    pass\n"


@pytest.mark.parametrize(
    ("suite", "status", "runs", "words"),
    [
        (FINE, 0, 1, "1 passed"),
        (UNSTEADY + FINE, 0, 2, "unsteady: test_suite.py::test_unsteady failed beside other tests and passed alone"),
        (UNSTEADY + BROKEN, 1, 2, "unsteady: test_suite.py::test_unsteady"),
        (MANY, 1, 1, "4 failed"),
        ("import nothing_of_that_name\n", 1, 1, "1 error"),
        ("", 5, 1, "no tests ran"),
    ],
    ids=["all pass", "one passes alone", "one fails twice", "too many", "not collected", "no tests"],
)
def test_a_few_failures_have_a_second_run(tmp_path: Path, suite: str, status: int, runs: int, words: str) -> None:
    (tmp_path / "test_suite.py").write_text(suite)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    outcome = _second_run(tmp_path)

    assert outcome.returncode == status, outcome.stdout
    assert words in outcome.stdout
    assert 1 + outcome.stdout.count("a second run") == runs
    assert "unsteady: test_suite.py::test_broken" not in outcome.stdout
    assert not (tmp_path / ".pytest_cache").exists()


def _second_run(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.second_run", "-p", "xdist", "-n", "1", "--dist", "loadfile"]
    return subprocess.run(
        [*command, "--rootdir", str(directory), "-c", str(directory / "pytest.ini"), str(directory)],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # the others take seconds to import
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
