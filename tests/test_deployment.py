"""configs/systemd fits the code: systemd's own verifiers judge the units, and what they start is parsed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from lamella_worker.config import load_config
from tests.shown_commands import parse

ROOT = Path(__file__).resolve().parent.parent
UNITS = sorted((ROOT / "configs" / "systemd").iterdir())


def _directives(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if line and line[0] not in "#;[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def _command(unit: Path) -> list[str]:
    (start,) = _directives(unit)["ExecStart"]
    return shlex.split(start.replace("%i", "0").replace("%l", "host"))


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_unit_satisfies_systemd(unit: Path, tmp_path: Path) -> None:
    """The programs need not be installed here, so that others stand in for them."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    instance = tmp_path / unit.name.replace("@.", "@0.")
    instance.write_text(re.sub(r"^(Exec\w+=[+-]*)/\S+", r"\1/bin/true", unit.read_text(), flags=re.MULTILINE))

    outcome = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(instance)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )

    assert outcome.returncode == 0, outcome.stderr
    assert instance.name not in outcome.stderr, outcome.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_unit_starts_a_command_that_is_understood(unit: Path) -> None:
    program, *words = _command(unit)

    assert program == "/opt/lamella/bin/lamella"
    assert parse(words)


def test_worker_unit_is_pinned_to_the_card_of_its_instance() -> None:
    unit = ROOT / "configs" / "systemd" / "lamella-worker@.service"
    (start,) = _directives(unit)["ExecStart"]

    assert "--device cuda:%i" in start
    assert "%i" in start.partition("--name ")[2], "two workers of a host must not share a name"
    assert parse(_command(unit)[1:])["device"] == "cuda:0"


def test_worker_unit_fits_the_drain_and_the_engine_in_a_child() -> None:
    directives = _directives(ROOT / "configs" / "systemd" / "lamella-worker@.service")
    longest = max(
        load_config(path, {}, environ={}).worker.drain_s for path in sorted((ROOT / "configs").glob("*.toml"))
    )

    assert _seconds(directives["TimeoutStopSec"][0]) >= longest + 10
    assert directives["KillSignal"] == ["SIGTERM"]
    assert directives["KillMode"] == ["mixed"], "the engine's process is the worker's to stop"
    assert directives["OOMPolicy"] == ["continue"], "the worker starts an engine again that the kernel killed"
    assert directives["LimitMEMLOCK"] == ["infinity"]


def test_gateway_unit_stops_after_its_grace() -> None:
    unit = ROOT / "configs" / "systemd" / "lamella-gateway.service"

    grace_s = parse(_command(unit)[1:])["grace_s"]

    assert _seconds(_directives(unit)["TimeoutStopSec"][0]) >= grace_s + 10


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_unit_is_hardened_and_restarted(unit: Path) -> None:
    directives = _directives(unit)

    assert directives["User"] == ["lamella"]
    for key, value in {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "CapabilityBoundingSet": ""}.items():
        assert directives[key] == [value], key
    assert directives["Restart"] == ["on-failure"]
    assert directives["RestartPreventExitStatus"] == ["2"], "the exit code of a setting that cannot work"
    assert "StartLimitBurst" in directives
    assert not [line for line in directives.get("Environment", []) if "PASSWORD=" in line]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_unit_exposes_little_by_systemds_own_judgement(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    instance = tmp_path / unit.name.replace("@.", "@0.")
    instance.write_text(unit.read_text())

    outcome = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=25", str(instance)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert outcome.returncode == 0, outcome.stdout[-300:] + outcome.stderr
