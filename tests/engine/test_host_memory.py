"""Host memory is exact and outlives close while it is used; every byte given to the driver is counted and taken back.

`Driver` stands in for the CUDA runtime, so that what the engine asks of it is seen without a GPU; `test_ram_tier_cuda`
asks the real one.
"""

from __future__ import annotations

import gc
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lamella_engine import host_memory
from lamella_engine.errors import DeviceError, EngineClosed
from lamella_engine.host_memory import HostMemory, peak_pinned_bytes, pinned_bytes
from lamella_engine.ram_tier import RamTier

linux_only = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are looked up under /proc")


class Driver:
    """A CUDA runtime that pins `limit` bytes at most and keeps books."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.ranges: dict[int, int] = {}
        self.calls: list[str] = []
        self.unregister_code = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(f"register {nbytes} {flags}")
        if sum(self.ranges.values()) + nbytes > self.limit:
            return 2
        assert address % mmap.PAGESIZE == 0
        self.ranges[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        if self.unregister_code == 0:
            self.calls.append(f"unregister {self.ranges.pop(address)}")
        return self.unregister_code

    def cudaGetErrorString(self, code: int) -> str:
        return {2: "out of memory", 700: "an illegal memory access was encountered"}[code]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(host_memory, "_pinned", type(host_memory._pinned)())
    yield driver
    assert driver.ranges == {} or driver.unregister_code


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


@pytest.mark.parametrize("nbytes", [1, 4096, 12_345, 3 << 20])
def test_memory_is_exact_aligned_zero_and_writable(nbytes: int) -> None:
    with HostMemory(nbytes) as memory:
        memory.view[-1:] = b"\x05"

        assert (memory.tensor.shape, memory.tensor.dtype) == ((nbytes,), torch.uint8)
        assert memory.tensor.data_ptr() % mmap.PAGESIZE == 0
        assert len(memory.view) == memory.nbytes == nbytes
        assert int(memory.tensor[-1]) == 5
        assert int(memory.tensor.sum()) == 5


@linux_only
def test_memory_goes_back_when_the_last_tensor_is_gone() -> None:
    memory = HostMemory(8 << 20)
    address = memory.tensor.data_ptr()
    part = memory.tensor[4096:8192].view(torch.float32)
    view = memory.view[:10]

    memory.close()
    memory.close()
    part.fill_(1.0)

    assert is_mapped(address)
    assert float(part.sum()) == 1024.0
    del part, view
    gc.collect()
    assert not is_mapped(address)


def test_use_after_close_is_an_error() -> None:
    memory = HostMemory(100)

    memory.close()

    with pytest.raises(EngineClosed, match="after close"):
        _ = memory.tensor
    with pytest.raises(EngineClosed, match="after close"):
        _ = memory.view


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(DeviceError, match="RAM budget"):
        HostMemory(1 << 55)


def test_pinning_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(DeviceError, match="no CUDA device here"):
        HostMemory(4096, pinned=True)

    assert pinned_bytes() == 0


def test_pinned_bytes_are_exact_and_the_peak_stays(driver: Driver) -> None:
    with HostMemory(5000, pinned=True) as first:
        with HostMemory(12_000_001, pinned=True):
            assert pinned_bytes() == 12_005_001
        first.close()

        assert (pinned_bytes(), peak_pinned_bytes()) == (0, 12_005_001)

    assert driver.calls == ["register 5000 0", "register 12000001 0", "unregister 12000001", "unregister 5000"]


def test_a_driver_that_refuses_is_named_and_nothing_is_counted(driver: Driver) -> None:
    driver.limit = 10_000

    with (
        HostMemory(8000, pinned=True),
        pytest.raises(DeviceError, match=r"cannot pin 4,096 bytes .* beside the 8,000 .* out of memory \(code 2\)"),
    ):
        HostMemory(4096, pinned=True)

    assert (pinned_bytes(), peak_pinned_bytes()) == (0, 8000)


@linux_only
def test_memory_that_the_driver_does_not_let_go_of_is_never_unmapped(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    memory = HostMemory(1 << 20, pinned=True)
    address = memory.tensor.data_ptr()
    driver.unregister_code = 700

    with caplog.at_level(logging.WARNING):
        memory.close()
    gc.collect()

    assert is_mapped(address)
    assert pinned_bytes() == 1 << 20
    assert "illegal memory access" in caplog.text


@linux_only
@pytest.mark.parametrize("shared", [True, False])
def test_a_tier_pins_each_piece_once_and_unpins_all(driver: Driver, tmp_path: Path, shared: bool) -> None:
    directory = tmp_path / "shared" if shared else tmp_path / "no" / "such"
    with RamTier(directory, pinned=True) as tier, RamTier(directory, pinned=True) as other:
        for _ in range(2):
            tier.load("a" * 64, 10_000, bytearray)
            tier.load("b" * 64, 20_000, bytearray)
        other.load("a" * 64, 10_000, bytearray)

        assert pinned_bytes() == tier.nbytes + other.nbytes == 40_000
        tier.close()
        assert pinned_bytes() == 10_000

    assert (pinned_bytes(), driver.ranges) == (0, {})


@linux_only
def test_a_piece_that_cannot_be_pinned_leaves_nothing(driver: Driver, tmp_path: Path) -> None:
    driver.limit = 10_000
    with RamTier(tmp_path / "shared", pinned=True) as tier:
        tier.load("a" * 64, 8_000, bytearray)

        with pytest.raises(DeviceError, match="cannot pin"):
            tier.load("b" * 64, 8_000, bytearray)

        assert [path.name for path in (tmp_path / "shared").iterdir()] == ["a" * 64]
        assert tier.nbytes == 8_000
