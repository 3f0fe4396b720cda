"""What this machine can move and compute: short measurements, and figures to assume for a machine that is not here.

Each measurement takes some tens of milliseconds, is the best of several, and gives back what it allocated. `disk_speed`
measures the disk; `planner` and `estimate` use the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from lamella_engine.device import free_memory_bytes, release_library_memory
from lamella_engine.disk_speed import ASSUMED_DISK, DiskProfile, measure_disk
from lamella_engine.host_memory import HostMemory
from lamella_engine.placement import Bandwidths

__all__ = [
    "ASSUMED",
    "ASSUMED_CPU",
    "DiskProfile",
    "assumed_bandwidths",
    "measure_bandwidths",
    "measure_device_memory",
    "measure_disk",
    "measure_flops",
    "measure_h2d",
]

MIB = 1024**2
# A small card of some years ago in an ordinary PC: NVMe disk, PCIe 3.0 x16, 256 GB/s, 6.5 TFLOPS.
ASSUMED = Bandwidths(disk=ASSUMED_DISK, h2d=12e9, device_memory=256e9, flops=6.5e12)
# Two memory channels and some cores.
ASSUMED_CPU = Bandwidths(disk=ASSUMED_DISK, h2d=math.inf, device_memory=20e9, flops=100e9)

_REPEATS, _FEW = 5, 2  # the best counts: another program may take the machine for a moment
_COPY_BYTES = 32 * MIB
_CUDA_READ_BYTES = 256 * MIB
_CPU_READ_BYTES = 128 * MIB
_FREE_SHARE = 4  # of the free memory a measurement takes a quarter at most
_COLUMNS = 4096
_ENOUGH_S = 0.005  # a product that takes longer is large enough
_STILL_RISING = 1.5  # times as fast as half its size: a larger one may be faster still
_LONG_S = 0.05  # and one that takes longer than this is not repeated
_SMALLEST_PRODUCT, _LARGEST_PRODUCT = 256, 4096
_FLOAT32_BYTES = 4


def measure_bandwidths(device: torch.device, dtype: torch.dtype, disk: DiskProfile) -> Bandwidths:
    """Everything measured on `device` in the compute type `dtype`, with the disk as already measured.

    Raises:
        DeviceError: the driver refuses to pin a little memory.
    """
    names = {"disk", "device_memory", "flops"} | ({"h2d"} if device.type == "cuda" else set())
    return Bandwidths(
        disk=disk.bandwidth,
        h2d=measure_h2d(device),
        device_memory=measure_device_memory(device),
        flops=measure_flops(device, dtype),
        measured=frozenset(names),
    )


def measure_h2d(device: torch.device) -> float:
    """Bytes a second from pinned host memory to `device`; infinity on a CPU, where nothing is copied.

    Raises:
        DeviceError: the driver refuses to pin a little memory.
    """
    if device.type != "cuda":
        return math.inf
    with torch.cuda.device(device), HostMemory(_COPY_BYTES, pinned=True) as source:
        seconds = _copy_seconds(source, device)
    _give_back(device)
    return _COPY_BYTES / seconds


def measure_device_memory(device: torch.device) -> float:
    """Bytes a second at which `device` reads weights that it multiplies with."""
    wanted = _CUDA_READ_BYTES if device.type == "cuda" else _CPU_READ_BYTES
    nbytes = max(MIB, min(wanted, free_memory_bytes(device) // _FREE_SHARE))
    rows = max(1, nbytes // (_COLUMNS * _FLOAT32_BYTES))
    seconds = _read_seconds(rows, device)
    _give_back(device)
    return rows * _COLUMNS * _FLOAT32_BYTES / seconds


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product in `dtype` on `device`; a multiply-add counts as two.

    The product grows until it takes some milliseconds and is hardly faster than a smaller one, so that neither starting
    it counts, nor that its threads wait for a core which another program has.
    """
    best, size = 0.0, _SMALLEST_PRODUCT
    while (seconds := _product_seconds(size, device, dtype, _FEW)) < _LONG_S and size < _LARGEST_PRODUCT:
        flops = 2.0 * size**3 / seconds
        if seconds >= _ENOUGH_S and flops < _STILL_RISING * best:
            break
        best = max(best, flops)
        if 3 * (2 * size) ** 2 * _FLOAT32_BYTES > free_memory_bytes(device) // _FREE_SHARE:
            break
        size *= 2
    if seconds < _LONG_S:
        seconds = min(seconds, _product_seconds(size, device, dtype, _REPEATS))
    _give_back(device)
    return max(best, 2.0 * size**3 / seconds)


def assumed_bandwidths(device: torch.device) -> Bandwidths:
    """What to plan with where measuring is not worth it."""
    return ASSUMED if device.type == "cuda" else ASSUMED_CPU


def _copy_seconds(source: HostMemory, device: torch.device) -> float:
    target, pinned = torch.empty(source.nbytes, dtype=torch.uint8, device=device), source.tensor
    return _best_seconds(lambda: target.copy_(pinned, non_blocking=True), device)


def _read_seconds(rows: int, device: torch.device) -> float:
    with torch.inference_mode():
        weights, vector = torch.ones(rows, _COLUMNS, device=device), torch.ones(_COLUMNS, device=device)
        result = torch.empty(rows, device=device)
        return _best_seconds(lambda: torch.mv(weights, vector, out=result), device)


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    with torch.inference_mode():
        left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        result = torch.empty_like(left)
        return _best_seconds(lambda: torch.mm(left, right, out=result), device, repeats)


def _best_seconds(work: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """The shortest of some runs after one that does not count; on a GPU by its own clock."""
    work()
    if device.type != "cuda":
        return max(1e-9, min(_cpu_seconds(work) for _ in range(repeats)))
    with torch.cuda.device(device):
        return max(1e-9, min(_cuda_seconds(work) for _ in range(repeats)))


def _cpu_seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _cuda_seconds(work: Callable[[], object]) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch does not annotate it
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch does not annotate it
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _give_back(device: torch.device) -> None:
    """Leave none of it in the allocator's cache, where it would count against a budget."""
    if device.type == "cuda":
        release_library_memory()
        torch.cuda.empty_cache()
