"""Runs the engine's tests with the oldest and the newest transformers and torch, and prints what became of each pair.

    python -m tools.versions [--directory DIR] [--transformers oldest,newest,latest,5.20.2] [--torch 2.13.0] [TEST ...]

Each pair gets a virtual environment of its own, filled by pip with what pyproject.toml asks for but for these two:
``oldest`` is the lower end of the range there, ``newest`` the newest within it, ``latest`` the newest there is. Where
packages come from is pip's business (PIP_FIND_LINKS, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...). A pair that has a
result for the code as it is now is not run again, so that an interrupted run goes on. The exit status is 1 if a pair
within the ranges failed, ran out of time or could not be installed. Neighbours: `Makefile` (``make versions``).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
VARIED = ("transformers", "torch")
DEFAULT_TESTS = ["tests/engine"]
INSTALL_TIMEOUT_S = 1800.0
TEST_TIMEOUT_S = 3600.0
INTERRUPTED = 130
_KILL_S = 20.0
_SOURCES = ("client", "engine", "worker", "tests", "pyproject.toml")
_TELL_VERSIONS = "import importlib.metadata as m; print(*(m.version(n) for n in ('transformers', 'torch')))"

# Runs a command, its output going to the end of a file, for so many seconds at most; its status, None when time is up.
Run = Callable[[list[str], Path, float], int | None]


@dataclass(frozen=True)
class Pair:
    """One combination as asked for: ``oldest``, ``newest``, ``latest`` or a version, of each."""

    transformers: str
    torch: str

    @property
    def name(self) -> str:
        """Also the name of its directory."""
        return f"transformers-{self.transformers}-torch-{self.torch}"


@dataclass(frozen=True)
class Result:
    """What became of a pair.

    Attributes:
        outcome: ``passed``, ``failed``, ``timed out`` or ``not installed``.
        transformers, torch: the versions that were installed; empty if none were.
        supported: both are within the ranges of pyproject.toml.
        passed, failed, skipped: tests; errors count as failed.
        seconds: that the tests took.
        note: the reason, in a line, where it did not pass.
        source: fingerprint of the code and the tests that it holds for.
    """

    outcome: str
    transformers: str
    torch: str
    supported: bool
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""
    source: str = ""


def requirements(pyproject: Path, extra: str = "dev") -> list[Requirement]:
    """What the extra asks for, those of the project's own extras and of the base included."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    found: dict[str, Requirement] = {}
    waiting = [*project["dependencies"], *extras[extra]]
    while waiting:
        requirement = Requirement(waiting.pop(0))
        if requirement.name == project["name"]:
            waiting += [line for inner in sorted(requirement.extras) for line in extras[inner]]
        else:
            found[requirement.name] = requirement
    return list(found.values())


def wanted(pair: Pair, needed: list[Requirement]) -> list[str]:
    """The lines that pip is given for `pair`.

    Raises:
        ValueError: ``oldest`` of something that has no lower end in pyproject.toml.
    """
    return [
        _pinned(requirement, getattr(pair, requirement.name)) if requirement.name in VARIED else str(requirement)
        for requirement in needed
    ]


def _pinned(requirement: Requirement, version: str) -> str:
    if version == "latest":
        return requirement.name
    if version == "newest":
        return str(requirement)
    if version == "oldest":
        lower = [limit.version for limit in requirement.specifier if limit.operator == ">="]
        if not lower:
            raise ValueError(
                f"{requirement} in pyproject.toml names no oldest version; write it as {requirement.name}>="
            )
        version = lower[0]
    return f"{requirement.name}=={version}"


class Trials:
    """Runs pairs, each in a directory of its own below `directory`, where results are kept.

    Args:
        directory: made if it is not there.
        tests: what pytest is given.
        run: runs a command.
        pyproject: the ranges and the other requirements.
    """

    def __init__(self, directory: Path, tests: list[str], run: Run, pyproject: Path = ROOT / "pyproject.toml") -> None:
        self._directory = directory
        self._tests = tests
        self._run = run
        self._needed = requirements(pyproject)
        self._ranges = {need.name: need.specifier for need in self._needed if need.name in VARIED}
        self._source = fingerprint(pyproject.parent, tests)
        self.test_timeout_s = TEST_TIMEOUT_S
        self.processes = 2

    def result(self, pair: Pair) -> Result:
        """Run `pair`, unless there is a result for the code as it is."""
        home = self._directory / pair.name
        home.mkdir(parents=True, exist_ok=True)
        kept = home / "result.json"
        if kept.is_file():
            result = Result(**json.loads(kept.read_text()))
            if result.source == self._source:
                return result
        result = self._try(pair, home)
        written = kept.with_suffix(".part")
        written.write_text(json.dumps(asdict(result), indent=1))
        written.replace(kept)
        return result

    def _try(self, pair: Pair, home: Path) -> Result:
        log = home / "install.log"
        log.unlink(missing_ok=True)
        python = home / "venv/bin/python"
        asked_supported = all(self._may_be_supported(name, getattr(pair, name)) for name in VARIED)
        steps = [
            [sys.executable, "-m", "venv", str(home / "venv")],
            [str(python), "-m", "pip", "install", "--upgrade", *wanted(pair, self._needed)],
            [str(python), "-m", "pip", "install", "--no-deps", "--editable", str(ROOT)],
        ]
        for step in steps:
            status = self._run(step, log, INSTALL_TIMEOUT_S)
            if status != 0:
                note = f"{_reason(log, status)} ({log})"
                return Result("not installed", "", "", asked_supported, note=note, source=self._source)
        versions = self._installed(python, home)
        supported = all(self._ranges[name].contains(version, prereleases=True) for name, version in versions.items())
        return self._test(python, home, versions, supported=supported)

    def _may_be_supported(self, name: str, asked: str) -> bool:
        return asked in ("oldest", "newest") or (asked != "latest" and self._ranges[name].contains(asked))

    def _installed(self, python: Path, home: Path) -> dict[str, str]:
        told = home / "versions.txt"
        told.unlink(missing_ok=True)
        if self._run([str(python), "-c", _TELL_VERSIONS], told, _KILL_S * 3) != 0:
            raise OSError(f"{python} does not tell what is installed; see {told}, and remove {home} to start again")
        return dict(zip(VARIED, told.read_text().split()[-2:], strict=True))

    def _test(self, python: Path, home: Path, versions: dict[str, str], *, supported: bool) -> Result:
        log, report = home / "tests.log", home / "tests.xml"
        for file in (log, report):
            file.unlink(missing_ok=True)
        command = [str(python), "-m", "pytest", *self._tests, "-q", "-p", "no:cacheprovider", "-m", "not timing"]
        command += ["-n", str(self.processes), "--dist", "loadfile", f"--junitxml={report}"]
        began = time.monotonic()
        status = self._run(command, log, self.test_timeout_s)
        seconds = time.monotonic() - began
        passed, failed, skipped, first = read_report(report)
        outcome = "timed out" if status is None else "passed" if status == 0 and passed and not failed else "failed"
        note = "" if outcome == "passed" else f"{first or _reason(log, status)} ({log})"
        return Result(
            outcome, **versions, supported=supported, passed=passed, failed=failed, skipped=skipped,
            seconds=seconds, note=note, source=self._source,
        )  # fmt: skip


def fingerprint(root: Path, tests: list[str]) -> str:
    """Changes with the code, with the tests and with which of them are asked for."""
    digest = hashlib.blake2b("\0".join(tests).encode(), digest_size=16)
    for source in _SOURCES:
        top = root / source
        for path in [top] if top.is_file() else sorted(top.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def read_report(report: Path) -> tuple[int, int, int, str]:
    """Tests that passed, failed (errors too) and were skipped, and the first that failed, of a JUnit report.

    All 0 where there is none, as pytest writes it at the end.
    """
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return 0, 0, 0, ""
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    first = f"{bad[0].get('classname')}::{bad[0].get('name')}" if bad else ""
    return len(cases) - len(bad) - len(skipped), len(bad), len(skipped), first


def table(results: dict[Pair, Result]) -> str:
    """A line for each pair, as Markdown has tables."""
    rows = [("asked for", "transformers", "torch", "outcome", "passed", "failed", "skipped", "seconds")]
    for pair, result in results.items():
        outcome = result.outcome if result.supported else f"{result.outcome} (outside the range)"
        counts = (str(result.passed), str(result.failed), str(result.skipped), f"{result.seconds:.0f}")
        asked = f"{pair.transformers} / {pair.torch}"
        rows.append((asked, result.transformers or "-", result.torch or "-", outcome, *counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines += [f"{pair.name}: {result.note}" for pair, result in results.items() if result.note]
    return "\n".join(lines)


def run_command(command: list[str], log: Path, timeout_s: float) -> int | None:
    """Run `command` in the checkout; all it started ends when time is up or this process is told to end."""
    with log.open("ab") as file:
        child = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return child.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait(timeout=_KILL_S)


def main(arguments: list[str], run: Run = run_command) -> int:
    """Run all pairs and print the table; 1 if one within the ranges did not pass."""
    options = _parser().parse_args(arguments)
    with _directory(options.directory) as directory:
        trials = Trials(directory, options.tests or DEFAULT_TESTS, run)
        trials.test_timeout_s, trials.processes = options.timeout_s, options.processes
        results = {}
        for names in _pairs(options.transformers, options.torch):
            pair = Pair(*names)
            print(f"{pair.name} ...", file=sys.stderr, flush=True)
            results[pair] = trials.result(pair)
        print(table(results))
    return int(any(result.supported and result.outcome != "passed" for result in results.values()))


def _pairs(transformers: str | None, torch: str | None) -> list[tuple[str, ...]]:
    """Both ends, or every one of the first with every one of the second where one is asked for."""
    if transformers is None and torch is None:
        return [("oldest", "oldest"), ("newest", "newest"), ("latest", "latest")]
    columns = [(value or "oldest,newest").split(",") for value in (transformers, torch)]
    return list(itertools.product(*([name.strip() for name in column] for column in columns)))


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="lamella-versions-") as scratch:
        yield Path(scratch)


def _reason(log: Path, status: int | None) -> str:
    """The line of a log that says most: pip's first error, else its last line."""
    if status is None:
        return "time was up"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    told = [line.strip() for line in lines if line.strip()]
    errors = [line for line in told if re.match(r"ERROR|E  ", line)]
    return next(iter(errors or told[-1:]), f"exit status {status}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, help="for environments, logs and results; kept (default: temporary)")
    parser.add_argument("--transformers", metavar="LIST", help="oldest, newest, latest or versions, with commas")
    parser.add_argument("--torch", metavar="LIST", help="the same for torch; each goes with each")
    parser.add_argument("--timeout-s", type=float, default=TEST_TIMEOUT_S, help="for the tests of one pair")
    parser.add_argument("--processes", type=int, default=2, help="that share the tests of one pair")
    parser.add_argument("tests", nargs="*", help=f"for pytest (default: {' '.join(DEFAULT_TESTS)})")
    return parser


if __name__ == "__main__":
    # An interruption ends what runs (see `run_command`), not only this process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted; pairs that were run keep their results in the directory given", file=sys.stderr)
        sys.exit(INTERRUPTED)
