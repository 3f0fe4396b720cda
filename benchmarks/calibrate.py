"""What this machine can read, copy and compute, measured in the run that uses the figures as limits.

Owns the four lanes: disk (O_DIRECT, several depths, the best), host memory, host to device from pinned memory, device
memory, and arithmetic. Bytes and operations a second; each the best of several tries, since a limit is what the
machine can do and not what it does on average. Runs in a process of its own (`stage`); knows nothing of models.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.coldness import drop_file_cache

DEPTHS = (1, 2, 4, 8, 16)
BLOCK_BYTES = 8 << 20
SECONDS_PER_DEPTH = 1.5
BYTES_PER_DEPTH = 3 << 30
TRIES = 5
TURNS = 3  # of each depth
PLAIN_DEPTH = 4
PLAIN_LIMIT_S = 60.0
MIB = 1 << 20


def disk_bandwidth(paths: list[Path], *, seconds_per_depth: float = SECONDS_PER_DEPTH) -> dict[str, Any]:
    """Read `paths` with 1 to 16 threads at once; the best depth's bytes a second, and every depth's.

    With O_DIRECT; where the file system refuses it, through the file cache after dropping the files from it, and
    `direct` is false. Each depth has several turns, their order shuffled, and what counts is their mean: a disk that
    others share wanders by a third within a second.
    """
    is_direct = _takes_direct(paths[0])
    blocks, block_bytes = _blocks(paths)
    place = 0
    turns: dict[int, list[tuple[int, float]]] = {depth: [] for depth in DEPTHS}
    order = random.Random(0)
    for _ in range(TURNS):
        for depth in order.sample(DEPTHS, len(DEPTHS)):
            if not is_direct:
                drop_file_cache(paths)
            rotated = blocks[place:] + blocks[:place]
            read, seconds = _read_blocks(rotated, block_bytes, depth, seconds_per_depth / TURNS, _flags(is_direct))
            turns[depth].append((read, seconds))
            place = (place + read // block_bytes) % len(blocks)
    depths = {
        str(depth): round(sum(read for read, _ in found) / sum(seconds for _, seconds in found))
        for depth, found in turns.items()
    }
    return {"bytes_per_s": max(depths.values()), "direct": is_direct, "depths": depths, "block_bytes": block_bytes}


def plain_read(paths: list[Path], nbytes: int) -> float:
    """Bytes a second of reading about `nbytes` of `paths` in order and nothing else: what a sweep is held against."""
    is_direct = _takes_direct(paths[0])
    if not is_direct:
        drop_file_cache(paths)
    blocks, block_bytes = _blocks(paths)
    wanted = blocks[: max(PLAIN_DEPTH, nbytes // block_bytes)]
    read, seconds = _read_blocks(wanted, block_bytes, PLAIN_DEPTH, PLAIN_LIMIT_S, _flags(is_direct), is_endless=False)
    return read / seconds


def _flags(is_direct: bool) -> int:
    return os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if is_direct else 0)


def _blocks(paths: list[Path]) -> tuple[list[tuple[Path, int]], int]:
    """Where blocks of the files begin, and how long a block is."""
    blocks = [(path, at) for path in paths for at in range(0, path.stat().st_size - BLOCK_BYTES + 1, BLOCK_BYTES)]
    if blocks:
        return blocks, BLOCK_BYTES
    # Files smaller than a block: read each as a whole, rounded down to pages.
    block_bytes = min(BLOCK_BYTES, max(path.stat().st_size for path in paths) // mmap.PAGESIZE * mmap.PAGESIZE)
    blocks = [(path, 0) for path in paths if path.stat().st_size >= block_bytes > 0]
    if not blocks:
        raise ValueError("the files are smaller than a page: there is nothing to measure the disk with")
    return blocks, block_bytes


def _read_blocks(
    blocks: list[tuple[Path, int]],
    block_bytes: int,
    depth: int,
    seconds: float,
    flags: int,
    *,
    is_endless: bool = True,
) -> tuple[int, float]:
    """Bytes read by `depth` threads in order, and seconds taken; round and round for `seconds`, or each block once."""
    counts = [0] * depth
    failures: list[OSError] = []
    deadline = time.perf_counter() + seconds
    lock = threading.Lock()
    # Read directly, a block comes from the disk however often; through the file cache only the first time.
    order = itertools.cycle(blocks) if is_endless and flags & os.O_DIRECT else iter(blocks)

    def read(worker: int) -> None:
        buffer = memory[worker * block_bytes : (worker + 1) * block_bytes]
        while time.perf_counter() < deadline and (not is_endless or sum(counts) < BYTES_PER_DEPTH):
            with lock:
                place = next(order, None)
            if place is None:
                return
            try:
                counts[worker] += os.preadv(files[place[0]], [buffer], place[1])
            except OSError as error:
                failures.append(error)
                return

    with contextlib.ExitStack() as stack:
        memory = memoryview(mmap.mmap(-1, depth * block_bytes))
        memory[:: mmap.PAGESIZE] = bytes(len(memory[:: mmap.PAGESIZE]))  # or the first reads would pay for the pages
        files = {path: os.open(path, flags) for path in dict.fromkeys(path for path, _ in blocks)}
        for file in files.values():
            stack.callback(os.close, file)
        began = time.perf_counter()
        threads = [threading.Thread(target=read, args=(worker,), daemon=True) for worker in range(depth)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=seconds + 60.0)
        took = time.perf_counter() - began
        is_stuck = any(thread.is_alive() for thread in threads)
    if failures or is_stuck:
        raise OSError(f"reading for calibration failed: {failures[0] if failures else 'the disk does not answer'}")
    return sum(counts), took


def _takes_direct(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    try:
        with contextlib.closing(mmap.mmap(-1, mmap.PAGESIZE)) as buffer:
            os.preadv(file, [buffer], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    finally:
        os.close(file)
    return True


def host_memory_bandwidth(nbytes: int = 512 * MIB) -> float:
    """Bytes a second that all threads together read from host memory."""
    numbers = torch.ones(nbytes // 4, dtype=torch.float32)
    matrix, vector = numbers.view(-1, 4096), torch.ones(4096)
    best = min(_best_seconds(lambda: numbers.sum()), _best_seconds(lambda: torch.mv(matrix, vector)))
    return numbers.nbytes / best


def pinned_copy_bandwidth(device: torch.device, nbytes: int = 256 * MIB) -> float:
    """Bytes a second from pinned host memory to a GPU."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def copy() -> None:
        for _ in range(8):
            target.copy_(source, non_blocking=True)

    return 8 * nbytes / _best_seconds(copy, device)


def device_memory_bandwidth(device: torch.device, dtype: torch.dtype, nbytes: int = 512 * MIB) -> float:
    """Bytes a second that a matrix-vector product reads its matrix with, on a GPU."""
    columns = 8192
    matrix = torch.ones(nbytes // dtype.itemsize // columns, columns, dtype=dtype, device=device)
    vector = torch.ones(columns, dtype=dtype, device=device)

    def multiply() -> None:
        for _ in range(8):
            torch.mv(matrix, vector)

    def copy() -> None:  # reads one half and writes the other
        half = len(matrix) // 2
        for _ in range(8):
            matrix[:half].copy_(matrix[half : 2 * half])

    return 8 * matrix.nbytes / min(_best_seconds(multiply, device), _best_seconds(copy, device))


def operations_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds a second, counted as two, of a large square product."""
    size = 4096 if device.type == "cuda" else 1024
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right), device)


def _best_seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    def once() -> float:
        began = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    return min(once() for _ in range(TRIES))


def calibrate(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure every lane, one after the other; yields what is known after each.

    `spec`: device, dtype, files (to read from disk), seconds_per_depth.
    """
    device, dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"])
    report: dict[str, Any] = {"device": str(device), "dtype": spec["dtype"]}
    report["host_memory_bytes_per_s"] = host_memory_bandwidth()
    yield report
    if device.type == "cuda":
        report["h2d_bytes_per_s"] = pinned_copy_bandwidth(device)
        report["device_memory_bytes_per_s"] = device_memory_bandwidth(device, dtype)
    else:
        report["device_memory_bytes_per_s"] = report["host_memory_bytes_per_s"]
    report["operations_per_s"] = operations_per_second(device, dtype)
    yield report
    files = [Path(name) for name in spec["files"]]
    report["disk"] = disk_bandwidth(files, seconds_per_depth=spec["seconds_per_depth"])
    yield report
