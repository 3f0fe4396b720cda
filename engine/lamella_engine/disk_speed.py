"""How fast the disk under the shards is, and how it likes to be asked: some requests at once, of some size.

Owns a short, bounded measurement that reads real files past the file cache and leaves nothing in it. `calibration`
puts the figure beside those of the device; the reader takes depth and block size from it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import EINVAL, EOPNOTSUPP
from pathlib import Path

from lamella_engine.errors import ShardError

MIB = 1024**2
ASSUMED_DISK = 2e9  # bytes a second
LIMIT_S = 0.8  # with the last blocks in flight about a second
LIMIT_BYTES = 512 * MIB
_STALL_S = 30.0  # one read that takes longer is a broken disk
_ALIGNMENT = 4096
_CLOSE_ENOUGH = 0.95  # fewer requests in flight are taken if they reach this much of the best
_USUAL = (4, 8 * MIB)  # and these before any others if they reach
_USUAL_ENOUGH = 0.8  # this much: a disk that others share wanders by more from one short trial to the next
# Requests at once and bytes of each, fewest bytes in flight first: a slow disk never gets to the last ones.
_TRIALS = tuple(
    sorted(((depth, block * MIB) for depth in (1, 2, 4, 8) for block in (2, 8)), key=lambda way: way[0] * way[1])
)


@dataclass(frozen=True)
class DiskProfile:
    """What a disk gives at its best: bytes a second, and how to ask for them.

    `direct` is False where the file system refuses reads past the file cache.
    """

    bandwidth: float
    depth: int
    block_bytes: int
    direct: bool

    @classmethod
    def assumed(cls) -> DiskProfile:
        """An ordinary NVMe disk, for where measuring is not worth it."""
        return cls(ASSUMED_DISK, *_USUAL, direct=True)


@dataclass(frozen=True)
class _Span:
    """A block to read: an open file, an aligned offset, and how many bytes to ask for."""

    file: int
    offset: int
    nbytes: int


class _Blocks:
    """Hands out the blocks of all files, round and round; any thread may take one."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self._sizes = list(sizes.items())
        self._lock = threading.Lock()
        self._index = self._offset = 0

    def take(self, nbytes: int) -> _Span:
        """The next block, shorter at the end of a file."""
        with self._lock:
            file, size = self._sizes[self._index]
            span = _Span(file, self._offset, min(nbytes, -(-(size - self._offset) // _ALIGNMENT) * _ALIGNMENT))
            self._offset += span.nbytes
            if self._offset >= size:
                self._index, self._offset = (self._index + 1) % len(self._sizes), 0
            return span


@dataclass
class _Trial:
    """One way of asking, tried for a while; `lock` guards what its threads share."""

    depth: int
    block_bytes: int
    until_s: float
    bytes_left: int
    done_bytes: int = 0
    ended_s: float = 0.0
    error: OSError | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def may_read(self) -> bool:
        """Whether one more block is within the limits; counts it if so. The first one always is."""
        with self.lock:
            is_first = self.done_bytes == 0 and self.bytes_left > 0
            if self.error or (not is_first and time.perf_counter() >= self.until_s) or self.bytes_left <= 0:
                return False
            self.bytes_left -= self.block_bytes
            return True

    def count(self, nbytes: int) -> None:
        """Note `nbytes` bytes that have arrived."""
        with self.lock:
            self.done_bytes += nbytes
            self.ended_s = time.perf_counter()


def measure_disk(
    paths: Path | Sequence[Path], *, limit_s: float = LIMIT_S, limit_bytes: int = LIMIT_BYTES
) -> DiskProfile:
    """Read some of `paths` with several depths and block sizes, and return the best.

    Reads pass by the file cache (O_DIRECT); where that is refused they are buffered and what they brought is dropped
    from the cache before and after. On a disk that needs longer than `limit_s` for a few blocks the first figure
    stands.

    Args:
        paths: files to read, such as a model's shards; nothing is written.
        limit_s: seconds that all of it may take, plus the last block.
        limit_bytes: bytes that are read at most.

    Raises:
        ShardError: a file cannot be read, all are empty, or the disk does not answer.
    """
    began_s = time.perf_counter()
    with _opened([paths] if isinstance(paths, Path) else list(paths)) as (sizes, direct):
        largest = max(sizes.values())
        blocks, buffers = _Blocks(sizes), _Buffers(min(_TRIALS[-1][1], -(-largest // _ALIGNMENT) * _ALIGNMENT))
        found: list[DiskProfile] = []
        for number, (depth, block_bytes) in enumerate(_TRIALS):
            left_s = began_s + limit_s - time.perf_counter()
            speed = max((profile.bandwidth for profile in found), default=0.0)
            share_bytes = limit_bytes // len(_TRIALS)
            in_flight = depth * min(block_bytes, buffers.nbytes)
            if found and (left_s <= 0 or in_flight > share_bytes or in_flight / speed > left_s / 2):
                break
            share_s = left_s / (len(_TRIALS) - number)
            trial = _Trial(depth, min(block_bytes, buffers.nbytes), time.perf_counter() + share_s, share_bytes)
            found.append(DiskProfile(_run(trial, blocks, buffers, direct=direct), depth, block_bytes, direct))
    best = max(profile.bandwidth for profile in found)
    usual = next((profile for profile in found if (profile.depth, profile.block_bytes) == _USUAL), None)
    if usual is not None and usual.bandwidth >= _USUAL_ENOUGH * best:
        return usual
    return next(profile for profile in found if profile.bandwidth >= _CLOSE_ENOUGH * best)


class _Buffers:
    """Page-aligned memory of `nbytes` for each reading thread, made when it is first needed and touched once."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._made: list[mmap.mmap] = []

    def get(self, number: int) -> mmap.mmap:
        """The buffer of thread `number`."""
        while len(self._made) <= number:
            buffer = mmap.mmap(-1, self.nbytes)
            buffer.write(bytes(self.nbytes))  # or the first trial would pay for its pages
            self._made.append(buffer)
        return self._made[number]


def _run(trial: _Trial, blocks: _Blocks, buffers: _Buffers, *, direct: bool) -> float:
    """Bytes a second that `trial` reaches."""
    memory = [buffers.get(number) for number in range(trial.depth)]
    began_s = time.perf_counter()
    threads = [
        threading.Thread(target=_read, args=(trial, blocks, buffer, direct), name="lamella-calibrate", daemon=True)
        for buffer in memory
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=max(0.0, trial.until_s + _STALL_S - time.perf_counter()))
    if any(thread.is_alive() for thread in threads):
        raise ShardError(f"the disk under the shards does not answer: one read takes more than {_STALL_S:.0f} s")
    if trial.error is not None:
        raise ShardError(f"reading shards failed: {trial.error.strerror or trial.error}") from trial.error
    return trial.done_bytes / max(trial.ended_s - began_s, 1e-9)


def _read(trial: _Trial, blocks: _Blocks, buffer: mmap.mmap, direct: bool) -> None:
    """The reading thread."""
    with memoryview(buffer) as view:
        while trial.may_read():
            span = blocks.take(trial.block_bytes)
            try:
                if not direct:
                    _forget(span)
                count = os.preadv(span.file, [view[: span.nbytes]], span.offset)
                if not direct:
                    _forget(span)
            except OSError as error:
                trial.error = error
                return
            if count == 0:
                trial.error = OSError("a file became shorter while it was read")
                return
            trial.count(count)


def _forget(span: _Span) -> None:
    """Drop the block from the file cache, where the system knows how."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(span.file, span.offset, span.nbytes, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(paths: list[Path]) -> Iterator[tuple[dict[int, int], bool]]:
    """Open files with their sizes, and whether they can be read past the file cache: all of them or none."""
    with contextlib.ExitStack() as stack:
        try:
            sizes = _open_all(paths, getattr(os, "O_DIRECT", 0), stack)
            direct = bool(sizes) and hasattr(os, "O_DIRECT") and _can_read(next(iter(sizes)))
            if not direct:
                sizes = _open_all(paths, 0, stack)
        except OSError as error:
            raise ShardError(f"cannot open {error.filename}: {error.strerror}") from error
        if not sizes:
            raise ShardError(f"there is nothing to measure the disk with: {len(paths)} files, all empty")
        yield sizes, direct


def _open_all(paths: list[Path], flags: int, stack: contextlib.ExitStack) -> dict[int, int]:
    """Descriptors and sizes of the files that hold anything; empty if the flags are refused."""
    sizes: dict[int, int] = {}
    for path in paths:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        except OSError as error:
            if flags and error.errno in (EINVAL, EOPNOTSUPP):
                return {}
            raise
        stack.callback(os.close, file)
        if size := os.fstat(file).st_size:
            sizes[file] = size
    return sizes


def _can_read(file: int) -> bool:
    """Some file systems open for direct reads and refuse the first one."""
    try:
        os.preadv(file, [mmap.mmap(-1, _ALIGNMENT)], 0)
    except OSError as error:
        if error.errno in (EINVAL, EOPNOTSUPP):
            return False
        raise
    return True
