"""tools/versions.py: what pip is asked for, what is kept, and the table, with commands that do not run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import wait_until
from tools import versions
from tools.versions import Pair, Result, Trials, read_report, requirements, run_command, table, wanted

PYPROJECT = """
[project]
name = "thing"
dependencies = ["redis>=6"]
[project.optional-dependencies]
worker = ["transformers>=5.17,<5.24", "torch>=2.6", "gguf"]
dev = ["thing[worker]", "pytest>=9"]
"""
REPORT = """<testsuites><testsuite><testcase classname="a" name="one"/><testcase classname="a" name="two"/>
{more}<testcase classname="b" name="off"><skipped/></testcase></testsuite></testsuites>"""
FAILURE = (
    '<testcase classname="b" name="bad"><failure/></testcase><testcase classname="b" name="worse"><error/></testcase>'
)


class Machine:
    """Takes the place of running commands: installs, tests and versions are as told, by pair."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.versions = "5.17.0 2.6.0"
        self.report: str | None = REPORT.format(more="")
        self.install_error = ""
        self.test_status: int | None = 0

    def run(self, command: list[str], log: Path, timeout_s: float) -> int | None:
        self.commands.append(command)
        if "pytest" in command:
            if self.report is not None:
                (log.parent / "tests.xml").write_text(self.report)
            return self.test_status
        if "-c" in command:
            log.write_text(self.versions)
        if "install" in command and self.install_error:
            log.write_text(f"Looking in links\n{self.install_error}\nmore\n")
            return 1
        return 0

    @property
    def test_runs(self) -> int:
        return sum("pytest" in command for command in self.commands)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project/tests").mkdir(parents=True)
    (tmp_path / "project/tests/test_it.py").write_text("")
    path = tmp_path / "project/pyproject.toml"
    path.write_text(PYPROJECT)
    return path


def trials(machine: Machine, project: Path) -> Trials:
    return Trials(project.parent.parent / "trials", ["tests"], machine.run, project)


def test_pip_is_asked_for_the_ends_of_the_ranges(project: Path) -> None:
    needed = requirements(project)

    oldest, newest, latest, chosen = (
        wanted(pair, needed)
        for pair in (
            Pair("oldest", "oldest"),
            Pair("newest", "newest"),
            Pair("latest", "latest"),
            Pair("5.20.2", "newest"),
        )
    )

    assert {"transformers==5.17", "torch==2.6", "gguf", "redis>=6", "pytest>=9"} == set(oldest)
    assert {"transformers<5.24,>=5.17", "torch>=2.6"} <= set(newest)
    assert {"transformers", "torch"} <= set(latest)
    assert {"transformers==5.20.2", "torch>=2.6"} <= set(chosen)


def test_the_ranges_of_this_project_have_an_oldest_version() -> None:
    needed = requirements(versions.ROOT / "pyproject.toml")

    lines = wanted(Pair("oldest", "oldest"), needed)

    assert [line for line in lines if line.startswith(("transformers==5.", "torch==2."))]
    assert len(lines) == len(needed)


def test_a_pair_that_passes_has_its_versions_and_counts(machine: Machine, project: Path) -> None:
    result = trials(machine, project).result(Pair("oldest", "oldest"))

    assert (result.outcome, result.transformers, result.torch) == ("passed", "5.17.0", "2.6.0")
    assert (result.passed, result.failed, result.skipped, result.supported) == (2, 0, 1, True)


@pytest.mark.parametrize(
    ("report", "status", "outcome", "note"),
    [
        (REPORT.format(more=FAILURE), 1, "failed", "b::bad"),
        (None, 4, "failed", "exit status 4"),
        (None, None, "timed out", "time was up"),
        ("<testsuites/>", 0, "failed", "exit status 0"),
    ],
)
def test_a_pair_whose_tests_do_not_pass_says_what_happened(
    report: str | None, status: int | None, outcome: str, note: str, machine: Machine, project: Path
) -> None:
    machine.report, machine.test_status = report, status

    result = trials(machine, project).result(Pair("oldest", "oldest"))

    assert result.outcome == outcome
    assert result.note.startswith(note)


def test_a_pair_that_cannot_be_installed_says_so_in_the_words_of_pip(machine: Machine, project: Path) -> None:
    machine.install_error = "ERROR: No matching distribution found for torch==2.6"

    result = trials(machine, project).result(Pair("oldest", "oldest"))

    assert (result.outcome, result.supported) == ("not installed", True)
    assert "No matching distribution found for torch==2.6" in result.note
    assert machine.test_runs == 0


def test_versions_beyond_the_range_are_told_apart(machine: Machine, project: Path) -> None:
    machine.versions = "5.30.0 2.20.0"

    result = trials(machine, project).result(Pair("latest", "latest"))

    assert (result.outcome, result.supported) == ("passed", False)
    assert "passed (outside the range)" in table({Pair("latest", "latest"): result})


def test_a_result_is_kept_until_the_code_changes(machine: Machine, project: Path) -> None:
    first = trials(machine, project).result(Pair("oldest", "oldest"))
    again = trials(machine, project).result(Pair("oldest", "oldest"))
    runs_before = machine.test_runs
    (project.parent / "tests/test_it.py").write_text("# changed\n")

    trials(machine, project).result(Pair("oldest", "oldest"))

    assert again == first
    assert (runs_before, machine.test_runs) == (1, 2)


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1)])
def test_the_status_is_1_when_a_supported_pair_fails(
    status: int, expected: int, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.versions = "5.23.0 2.13.0"
    machine.test_status = status
    machine.report = REPORT.format(more=FAILURE if status else "")
    arguments = ["--directory", str(tmp_path), "--transformers", "newest", "--torch", "2.13.0, newest", "tests/x.py"]

    assert versions.main(arguments, machine.run) == expected

    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in printed[:4:3] + printed[2:3]] == [
        "asked for", "newest / newest", "newest / 2.13.0",
    ]  # fmt: skip
    assert {len(line) for line in printed[:4]} == {len(printed[0])}
    assert machine.test_runs == 2


def test_a_failure_outside_the_ranges_is_only_told(machine: Machine, tmp_path: Path) -> None:
    machine.versions = "99.0 99.0"
    machine.test_status, machine.report = 1, REPORT.format(more=FAILURE)

    assert versions.main(["--directory", str(tmp_path), "--transformers", "latest"], machine.run) == 0


def test_a_report_that_is_not_there_or_cut_off_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / "cut.xml").write_text("<testsuites><testcase")

    assert read_report(tmp_path / "cut.xml") == read_report(tmp_path / "none.xml") == (0, 0, 0, "")


def test_the_table_has_a_note_for_what_did_not_pass() -> None:
    bad = Result("not installed", "", "", True, note="ERROR: no such version")

    lines = table({Pair("oldest", "2.6"): bad}).splitlines()

    assert lines[2].split("|")[1:5] == [" oldest / 2.6 ", " -            ", " -     ", " not installed "]
    assert lines[-1] == "transformers-oldest-torch-2.6: ERROR: no such version"


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_a_command_that_takes_too_long_ends_with_all_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"

    status = run_command(["sh", "-c", "sleep 600 & echo $!; wait"], log, 1.0)

    assert status is None
    child = int(log.read_text())
    wait_until(lambda: not _is_alive(child))


def test_a_command_ends_by_itself(tmp_path: Path) -> None:
    log = tmp_path / "log"

    assert run_command([sys.executable, "-c", "print(7); raise SystemExit(3)"], log, 40.0) == 3
    assert log.read_text() == "7\n"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, timeout=40)
    return not shown.stdout.strip().startswith("Z") and bool(shown.stdout.strip())
