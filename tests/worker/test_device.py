"""Which device a worker pins itself to, and what it says when there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lamella.errors import ConfigError
from lamella_worker import device
from lamella_worker.device import Gpu, parse_gpus, pin_device, query_gpus

TWO = (
    Gpu(0, "GPU-aaaa-1", "Card A", 4 * 2**30, "0"),
    Gpu(1, "GPU-bbbb-2", "Card B", 6 * 2**30, "1"),
)
Lister = Callable[[], tuple[tuple[Gpu, ...], str]]


def two_gpus() -> tuple[tuple[Gpu, ...], str]:
    return TWO, ""


def no_gpus() -> tuple[tuple[Gpu, ...], str]:
    return (), "nvidia-smi is not installed"


@pytest.fixture
def torch_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.importlib.metadata, "version", lambda name: "2.13.0+cu126")


def test_cpu_hides_every_gpu() -> None:
    env = {"CUDA_VISIBLE_DEVICES": "0,1"}

    pinned = pin_device("cpu", env)

    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert (pinned.engine_device, pinned.short) == ("cpu", "cpu")


def test_a_numbered_gpu_becomes_the_only_one(tmp_path: Path) -> None:
    env: dict[str, str] = {}

    pinned = pin_device("cuda:1", env, two_gpus, tmp_path)

    assert env == {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert (pinned.engine_device, pinned.label, pinned.short) == ("cuda:0", "cuda:1 (Card B)", "cuda1")
    pinned.release()


@pytest.mark.parametrize("allowed", ["1", "GPU-bbbb", "1,0"])
def test_visible_devices_renumber(tmp_path: Path, allowed: str) -> None:
    env = {"CUDA_VISIBLE_DEVICES": allowed}

    pinned = pin_device("cuda:0", env, two_gpus, tmp_path)

    assert env["CUDA_VISIBLE_DEVICES"] == allowed.split(",")[0]
    assert pinned.label == "cuda:0 (Card B)"
    pinned.release()


def test_visible_devices_restrict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cuda:1 does not exist here \(CUDA_VISIBLE_DEVICES=0 leaves 1\)"):
        pin_device("cuda:1", {"CUDA_VISIBLE_DEVICES": "0"}, two_gpus, tmp_path)


def test_a_gpu_that_does_not_exist_names_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cuda:7 does not exist here.*cuda:0 \(Card A\), cuda:1 \(Card B\)"):
        pin_device("cuda:7", {}, two_gpus, tmp_path)


def test_a_gpu_on_a_host_without_driver_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nvidia-smi is not installed"):
        pin_device("cuda:0", {}, no_gpus, tmp_path)


def test_auto_without_gpu_is_the_cpu(tmp_path: Path) -> None:
    env: dict[str, str] = {}

    pinned = pin_device("auto", env, no_gpus, tmp_path)

    assert pinned.engine_device == "cpu"
    assert "nvidia-smi is not installed" in pinned.why
    assert env["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.usefixtures("torch_for_gpus")
def test_auto_takes_the_free_gpu_with_most_memory_and_leaves_held_ones(tmp_path: Path) -> None:
    first_env: dict[str, str] = {}
    second_env: dict[str, str] = {}
    third_env: dict[str, str] = {}

    first = pin_device("auto", first_env, two_gpus, tmp_path)
    second = pin_device("auto", second_env, two_gpus, tmp_path)
    third = pin_device("auto", third_env, two_gpus, tmp_path)

    assert [env["CUDA_VISIBLE_DEVICES"] for env in (first_env, second_env, third_env)] == ["1", "0", ""]
    assert "other workers hold all 2 GPUs" in third.why
    for pinned in (first, second, third):
        pinned.release()


@pytest.mark.usefixtures("torch_for_gpus")
def test_a_released_gpu_can_be_chosen_again(tmp_path: Path) -> None:
    pin_device("auto", {}, two_gpus, tmp_path).release()

    again = pin_device("auto", {}, two_gpus, tmp_path)

    assert again.short == "cuda1"
    again.release()


@pytest.mark.usefixtures("torch_for_gpus")
def test_auto_respects_an_empty_restriction(tmp_path: Path) -> None:
    pinned = pin_device("auto", {"CUDA_VISIBLE_DEVICES": ""}, two_gpus, tmp_path)

    assert pinned.engine_device == "cpu"


def test_auto_with_a_torch_for_the_cpu_is_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.importlib.metadata, "version", lambda name: "2.13.0+cpu")

    pinned = pin_device("auto", {}, two_gpus, tmp_path)

    assert pinned.engine_device == "cpu"
    assert "build for the CPU" in pinned.why


def test_a_lock_directory_that_cannot_be_made_does_not_stop_a_worker(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    pinned = pin_device("cuda:0", {}, two_gpus, tmp_path / "file" / "locks")

    assert pinned.engine_device == "cuda:0"


def test_the_drivers_listing_is_read_and_odd_lines_are_left_out() -> None:
    listing = "0, GPU-1f-2, NVIDIA GeForce GTX 1070, 7900\n1, GPU-3c, Odd, Name, [N/A]\nNo devices were found\n"

    gpus = parse_gpus(listing)

    assert gpus == (
        Gpu(0, "GPU-1f-2", "NVIDIA GeForce GTX 1070", 7900 * 2**20, "0"),
        Gpu(1, "GPU-3c", "Odd, Name", 0, "1"),
    )


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'driver mismatch'; exit 9", "nvidia-smi failed: driver mismatch"),
        ("exit 0", "nvidia-smi lists no GPU"),
    ],
)
def test_a_driver_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    gpus, why = query_gpus()

    assert gpus == ()
    assert why == said


def test_a_missing_driver_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert query_gpus() == ((), "nvidia-smi is not installed")
