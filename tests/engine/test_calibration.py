"""Measuring the machine: bounded in time and bytes, on real files, leaving nothing behind."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from lamella_engine.calibration import (
    ASSUMED,
    ASSUMED_CPU,
    DiskProfile,
    assumed_bandwidths,
    measure_bandwidths,
    measure_disk,
    measure_flops,
    measure_h2d,
)
from lamella_engine.errors import ShardError
from tests.descriptors import open_files_below

MIB = 1024**2
CPU = torch.device("cpu")
NO_TMPFS = Path("/dev/shm")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files of uneven size, one of them not a multiple of a page."""
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, size in zip(paths, (5 * MIB, 4096, 3 * MIB + 17), strict=True):
        path.write_bytes(os.urandom(size))
    return paths


def bytes_read() -> int:
    """Bytes this process has asked the kernel for so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_the_disk_is_measured_on_the_files_given(files: list[Path]) -> None:
    profile = measure_disk(files, limit_s=0.3)

    assert profile.bandwidth > 0
    assert profile.depth in (1, 2, 4, 8)
    assert profile.block_bytes in (2 * MIB, 8 * MIB)
    assert open_files_below(files[0].parent) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "lamella-calibrate"]


def test_one_file_and_one_byte_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "byte"
    path.write_bytes(b"x")

    assert measure_disk(path, limit_s=0.2).bandwidth > 0


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count this process's reads")
def test_no_more_is_read_than_allowed(files: list[Path]) -> None:
    before = bytes_read()

    measure_disk(files, limit_s=10.0, limit_bytes=64 * MIB)

    assert bytes_read() - before <= 64 * MIB + 8 * 8 * MIB


def test_measuring_ends_in_time(files: list[Path]) -> None:
    began_s = time.perf_counter()

    measure_disk(files, limit_s=0.1)

    assert time.perf_counter() - began_s < 20  # far less where the machine does not stall


@pytest.mark.skipif(not os.access(NO_TMPFS, os.W_OK), reason="no file system in memory here")
def test_a_file_system_in_memory_is_measured_too() -> None:
    path = NO_TMPFS / f"lamella-test-{os.getpid()}"
    try:
        path.write_bytes(bytes(MIB))

        profile = measure_disk(path, limit_s=0.2)
    finally:
        path.unlink(missing_ok=True)

    assert profile.bandwidth > 0


def test_files_that_cannot_be_measured_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    with pytest.raises(ShardError, match="absent"):
        measure_disk(tmp_path / "absent")
    with pytest.raises(ShardError, match="empty"):
        measure_disk([tmp_path / "empty"])
    with pytest.raises(ShardError, match="nothing to measure"):
        measure_disk([])


def test_a_cpu_is_measured_without_a_bus() -> None:
    disk = DiskProfile(1e9, 4, 8 * MIB, direct=True)

    found = measure_bandwidths(CPU, torch.float32, disk)

    assert found.disk == 1e9
    assert math.isinf(found.h2d)
    assert 1e7 < found.device_memory < 1e13
    assert 1e7 < found.flops < 1e15
    assert found.measured == {"disk", "device_memory", "flops"}


def test_half_types_are_measured_where_they_are_slow_too() -> None:
    assert measure_flops(CPU, torch.bfloat16) > 1e6


def test_what_is_assumed_is_not_called_measured() -> None:
    assert assumed_bandwidths(CPU) is ASSUMED_CPU
    assert assumed_bandwidths(torch.device("cuda", 0)) is ASSUMED
    assert ASSUMED.measured == ASSUMED_CPU.measured == frozenset()
    assert DiskProfile.assumed().bandwidth == ASSUMED.disk
    assert math.isinf(measure_h2d(CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_measured_and_gets_its_memory_back() -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)

    found = measure_bandwidths(device, torch.float16, DiskProfile.assumed())

    assert 5e8 < found.h2d < found.device_memory
    assert found.flops > 1e11
    assert "h2d" in found.measured
    # The matrix library keeps a workspace of its own.
    assert torch.cuda.memory_allocated(device) - before <= 40 * MIB
