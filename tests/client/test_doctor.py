"""Doctor: what it finds, what it advises, and when it fails."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner

from lamella.cli import app, check_gpu
from lamella.cli.check_gpu import Gpu, TorchBuild, check_gpus, judge_gpu, parse_gpus, runs_on
from lamella.cli.check_host import check_disk, default_store, measure_disk, nearest_directory
from lamella.cli.check_server import judge_worker, server_settings
from lamella.cli.finding import Level
from lamella.embedded import EmbeddedServer
from tests.client.acting_worker import ActingWorker

GTX_1070 = Gpu(0, "GTX 1070", 8192, "550.54.14", (6, 1))
RTX_4090 = Gpu(1, "RTX 4090", 24564, "580.95.05", (8, 9))
TORCH_CPU = TorchBuild("2.13.0+cpu", None, False, ())
TORCH_126 = TorchBuild("2.13.0+cu126", "12.6", True, ("sm_50", "sm_60", "sm_70", "sm_80", "sm_90"))
TORCH_130 = TorchBuild("2.13.0+cu130", "13.0", True, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"))
GOOD_INFO = {"maxmemory_policy": "noeviction", "aof_enabled": "1", "valkey_version": "9.1.2"}


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMELLA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("LAMELLA_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("LAMELLA_REDIS_URL", raising=False)


def smi(directory: Path, script: str) -> None:
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_60", (6, 1), True),
        ("sm_61", (6, 0), False),
        ("sm_75", (6, 1), False),
        ("sm_70", (7, 5), True),
        ("sm_80", (8, 9), True),
        ("sm_80", (9, 0), False),
        ("compute_80", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (9, 1), False),
        ("sm_120", (12, 0), True),
        ("gfx90", (9, 0), False),
        ("odd", (9, 0), False),
    ],
)
def test_which_code_runs_on_which_gpu(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(arch, capability) is runs


@pytest.mark.parametrize(
    ("gpu", "torch", "level", "says"),
    [
        (RTX_4090, TORCH_130, Level.GOOD, "runs on it"),
        (GTX_1070, TORCH_126, Level.GOOD, "runs on it"),
        (GTX_1070, TORCH_CPU, Level.BROKEN, "CUDA 12.6"),
        (RTX_4090, TORCH_CPU, Level.BROKEN, "a current torch with CUDA"),
        (GTX_1070._replace(driver="580.65"), TORCH_130, Level.BROKEN, "CUDA 12.6"),
        (RTX_4090._replace(driver="535.1"), TORCH_130, Level.BROKEN, "580.65 or newer"),
        (RTX_4090, TORCH_130._replace(is_available=False), Level.BROKEN, "CUDA_VISIBLE_DEVICES"),
        (GTX_1070._replace(capability=(5, 2)), TORCH_CPU, Level.BROKEN, "another GPU"),
    ],
)
def test_torch_driver_and_card_are_matched(gpu: Gpu, torch: TorchBuild, level: Level, says: str) -> None:
    finding = judge_gpu(gpu, torch)[0]

    assert finding.level is level
    assert says in finding.what + finding.fix


def test_old_cards_are_told_of_their_types() -> None:
    assert "float16" in judge_gpu(GTX_1070, TORCH_126)[1].fix
    assert len(judge_gpu(RTX_4090, TORCH_130)) == 1


def test_nvidia_smi_is_read_line_by_line() -> None:
    gpus, unread = parse_gpus("0, GTX 1070, 8192, 550.54.14, 6.1\nN/A, ?\n\n1, A100, [N/A], 550, 8.0\n")

    assert gpus == [GTX_1070]
    assert unread == ["N/A, ?", "1, A100, [N/A], 550, 8.0"]


def test_a_host_with_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, "echo '0, GTX 1070, 8192, 550.54.14, 6.1'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    findings = check_gpus()

    assert "GTX 1070, 8192 MiB, driver 550.54.14, compute capability 6.1" in findings[0].what


def test_a_broken_driver_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, "echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    finding = check_gpus()[0]

    assert finding.level is Level.BROKEN
    assert "could not communicate" in finding.what


def test_a_hanging_driver_does_not_hang_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, "exec sleep 60")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(check_gpu, "SMI_TIMEOUT_S", 0.2)

    assert "does not answer" in check_gpus()[0].what


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"maxmemory_policy": "allkeys-lru"}, "noeviction"),
        ({"aof_enabled": "0"}, "appendonly yes"),
        ({"aof_last_write_status": "err"}, "disk"),
        ({"valkey_version": "6.0.1"}, "Valkey 7.2"),
    ],
)
def test_a_server_that_could_lose_jobs_is_broken(facts: dict[str, str], says: str) -> None:
    findings = [finding for finding in server_settings(GOOD_INFO | facts) if finding.level is Level.BROKEN]

    assert len(findings) == 1
    assert says in findings[0].fix


def test_a_worker_that_no_longer_sweeps_is_broken(fake_redis: redis.Redis) -> None:
    info = ActingWorker(fake_redis).announce()
    now = time.time()

    assert judge_worker(info, now).level is Level.GOOD
    stuck = info.model_copy(update={"running": 2, "last_sweep_at": now - 10_000})
    assert judge_worker(stuck, now).level is Level.BROKEN


def test_the_disk_test_leaves_nothing_behind(tmp_path: Path) -> None:
    speed = measure_disk(tmp_path, 8 * 1024 * 1024)

    assert speed.read > 0
    assert speed.write > 0
    assert list(tmp_path.iterdir()) == []


def test_the_store_need_not_exist(tmp_path: Path) -> None:
    findings = check_disk(tmp_path / "not" / "yet", 4 * 1024 * 1024)

    assert any("reads" in finding.what for finding in findings)
    assert nearest_directory(tmp_path / "not" / "yet") == tmp_path
    assert not (tmp_path / "not").exists()
    assert default_store() == tmp_path / "store"


def test_a_healthy_host_exits_with_0(embedded_server: EmbeddedServer, embedded_redis: redis.Redis) -> None:
    ActingWorker(embedded_redis).announce()

    result = CliRunner().invoke(app, ["doctor", "--redis-url", embedded_server.url, "--disk-mib", "4"])

    assert result.exit_code == 0, result.output
    assert "append-only file is on" in result.stdout
    assert "acting serves tiny/model" in result.stdout


def test_something_broken_exits_with_1(embedded_server: EmbeddedServer, embedded_redis: redis.Redis) -> None:
    embedded_redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        result = CliRunner().invoke(app, ["doctor", "--redis-url", embedded_server.url, "--disk-mib", "4"])
    finally:
        embedded_redis.config_set("maxmemory-policy", "noeviction")

    assert result.exit_code == 1
    assert "BROKEN  server: maxmemory-policy is allkeys-lru" in result.stdout


def test_a_named_server_that_is_away_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMELLA_REDIS_URL", "redis://:geheim@127.0.0.1:1/0")
    result = CliRunner().invoke(app, ["doctor", "--disk-mib", "4"])

    assert result.exit_code == 1
    assert "no answer" in result.stdout
    assert "geheim" not in result.output
