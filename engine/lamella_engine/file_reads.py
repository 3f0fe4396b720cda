"""Reading parts of shard files into host memory: past the file cache where the file system allows it.

Owns open flags, alignment and short reads; knows nothing of rings, threads in flight or devices. `disk_reader` reads
round and round with it, `loader` reads once.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EINVAL, EOPNOTSUPP
from pathlib import Path

from lamella_engine.errors import ShardError
from lamella_engine.pieces import Piece

ALIGNMENT = 4096  # of offsets, lengths and memory for O_DIRECT on every file system we know
STALL_S = 120.0  # a read slower than this is a broken disk
DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True)
class ReadStyle:
    """How a disk likes to be read: `depth` requests of `block_bytes` at once, `direct` past the file cache."""

    depth: int = 4
    block_bytes: int = 8 * 1024 * 1024
    direct: bool = True


class ShardFile:
    """One open shard file; `read` may be called from several threads."""

    def __init__(self, path: Path, *, direct: bool) -> None:
        self._path = path
        self._buffered = _open(path, 0)
        self._stamp = self._stamp_now()
        self._direct: int | None = None
        self._is_direct = False
        if direct and DIRECT:
            with contextlib.suppress(ShardError):
                self._direct = _open(path, DIRECT)
                self._is_direct = True

    @property
    def is_direct(self) -> bool:
        """Whether reads pass by the file cache."""
        return self._is_direct

    def read(self, view: memoryview, start: int, needed: int) -> None:
        """Fill `view` from `start` on; at least `needed` bytes, the rest of an aligned read may lie past the end.

        Raises:
            ShardError: the file ends early, cannot be read, or was written to since it was opened.
        """
        done = 0
        while done < needed:
            count = self._read_once(view[done:], start + done)
            if count <= 0 or (self._is_direct and count % ALIGNMENT and done + count < needed):
                raise ShardError(
                    f"{self._path} ends {needed - done - max(count, 0)} bytes early; it was changed while in use. "
                    "Remove the model from the store and build it again."
                )
            done += count
        if self._stamp_now() != self._stamp:  # after the read, so that nothing of a later write is in it
            raise ShardError(f"{self._path} was changed while in use; its bytes are not trusted any more")
        if not self._is_direct:
            _drop_cache(self._buffered, start, needed)

    def close(self) -> None:
        """Close the file; not to be called twice."""
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)

    def _stamp_now(self) -> tuple[int, int]:
        """What every write changes; removing and renaming the file do not."""
        status = os.fstat(self._buffered)
        return status.st_size, status.st_mtime_ns

    def _read_once(self, view: memoryview, start: int) -> int:
        file = self._direct if self._is_direct and self._direct is not None else self._buffered
        try:
            return os.preadv(file, [view], start)
        except OSError as error:
            if file != self._buffered and error.errno in (EINVAL, EOPNOTSUPP):
                self._is_direct = False  # opened, but refused at the first read: some network file systems
                return self._read_once(view, start)
            raise ShardError(f"reading {self._path} failed: {error.strerror}") from error


def aligned_range(start: int, nbytes: int) -> tuple[int, int, int]:
    """The aligned range that holds `nbytes` bytes from `start`: its start, its length, and where the bytes begin."""
    low = start // ALIGNMENT * ALIGNMENT
    skip = start - low
    return low, -(-(skip + nbytes) // ALIGNMENT) * ALIGNMENT, skip


def read_piece(piece: Piece, view: memoryview, style: ReadStyle) -> None:
    """Read all bytes of `piece` into `view` (page-aligned memory of its size), several blocks at a time.

    Raises:
        ShardError: the file ends early or cannot be read.
    """
    direct = style.direct and piece.start % ALIGNMENT == 0
    whole = piece.nbytes // ALIGNMENT * ALIGNMENT if direct else piece.nbytes
    spans = [(low, min(low + style.block_bytes, whole)) for low in range(0, whole, style.block_bytes)]
    if whole < piece.nbytes:
        spans.append((whole, piece.nbytes))  # a direct read must end on a page; the last bytes come buffered
    with (
        _opened(piece.path, direct=direct) as file,
        _opened(piece.path, direct=False) as tail,
        ThreadPoolExecutor(style.depth, thread_name_prefix="lamella-load") as pool,
    ):
        reads = [
            pool.submit((tail if low == whole else file).read, view[low:high], piece.start + low, high - low)
            for low, high in spans
        ]
        for read in reads:
            read.result(timeout=STALL_S)


@contextmanager
def _opened(path: Path, *, direct: bool) -> Iterator[ShardFile]:
    file = ShardFile(path, direct=direct)
    try:
        yield file
    finally:
        file.close()


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    except OSError as error:
        raise ShardError(f"cannot open {path}: {error.strerror}. Build the model again.") from error


def _drop_cache(file: int, start: int, nbytes: int) -> None:
    """Keep what the plan does not place in RAM out of it; the next sweep would not find it there anyway."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        advise(file, start // mmap.PAGESIZE * mmap.PAGESIZE, nbytes, os.POSIX_FADV_DONTNEED)
