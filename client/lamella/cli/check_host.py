"""Doctor's look at the host: the disk that layers stream from, free space, memory."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from lamella.cli.finding import Finding, broken, good, note
from lamella.cli.output import size

BLOCK_BYTES = 4 * 1024 * 1024
MAX_SECONDS = 5.0  # of writing, and again of reading
SLOW_READ = 300e6  # bytes/s; below it a layer of a large model takes seconds
LEAST_FREE_BYTES = 5e9
LEAST_MEMORY_BYTES = 4e9


class DiskSpeed(NamedTuple):
    """Sequential speeds in bytes/s; `is_direct` tells whether reading went past the page cache."""

    write: float
    read: float
    is_direct: bool


def default_store() -> Path:
    """Return the store that workers use when none is named."""
    configured = os.environ.get("LAMELLA_STORE")
    return Path(configured).expanduser() if configured else Path("~/.cache/lamella/shards").expanduser()


def check_disk(store: Path, num_bytes: int) -> list[Finding]:
    """Measure the disk under the store with a temporary file of at most `num_bytes`, deleted afterwards."""
    place = nearest_directory(store)
    if not os.access(place, os.W_OK | os.X_OK):
        return [broken(f"store: {place} is not writable", "choose another with --store or LAMELLA_STORE")]
    free = shutil.disk_usage(place).free
    findings = []
    if free < LEAST_FREE_BYTES:
        findings.append(note(f"store: {size(free)} free on {place}", "free some; a model takes its size on disk once"))
    else:
        findings.append(good(f"store: {size(free)} free on {place}"))
    affordable = min(num_bytes, int(free / 10)) // BLOCK_BYTES * BLOCK_BYTES
    if affordable < BLOCK_BYTES:
        return [*findings, broken("store: too full to measure its speed", "free some space")]
    try:
        speed = measure_disk(place, affordable)
    except OSError as error:
        return [*findings, broken(f"store: cannot be written ({error.strerror})", "check the disk and its quota")]
    how = "" if speed.is_direct else " (through the page cache: this file system refuses direct reads)"
    what = f"store: reads {size(speed.read)}/s{how}, writes {size(speed.write)}/s"
    if speed.read < SLOW_READ:
        return [*findings, note(what, "put the store on an NVMe disk: every sweep reads what does not fit in memory")]
    return [*findings, good(what)]


def measure_disk(directory: Path, num_bytes: int) -> DiskSpeed:
    """Write, flush and read back a temporary file in blocks of 4 MiB, each for at most a few seconds."""
    with mmap.mmap(-1, BLOCK_BYTES) as block, tempfile.NamedTemporaryFile(dir=directory, prefix=".lamella-") as file:
        block.write(os.urandom(BLOCK_BYTES))
        started = time.monotonic()
        written = 0
        while written < num_bytes and time.monotonic() - started < MAX_SECONDS:
            written += os.write(file.fileno(), block)
        os.fsync(file.fileno())
        write_s = time.monotonic() - started
        fd, is_direct = _open_past_cache(file.name)
        try:
            started = time.monotonic()
            read = 0
            while time.monotonic() - started < MAX_SECONDS and (count := os.readv(fd, [block])) > 0:
                read += count
            read_s = time.monotonic() - started
        finally:
            os.close(fd)
    return DiskSpeed(written / max(write_s, 1e-6), read / max(read_s, 1e-6), is_direct)


def check_memory() -> list[Finding]:
    """Check the memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _group_limit()
    usable = min(total, limit) if limit is not None else total
    what = f"memory: {size(usable)}" + (" (limited by the control group)" if usable < total else "")
    if usable < LEAST_MEMORY_BYTES:
        return [note(what, "choose a small model, or add memory: one layer and the context must fit")]
    return [good(what)]


def nearest_directory(path: Path) -> Path:
    """Return `path`, or its nearest parent that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def _open_past_cache(name: str) -> tuple[int, bool]:
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(name, os.O_RDONLY | os.O_DIRECT), True
        except OSError:
            pass
    fd = os.open(name, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd, False


def _group_limit() -> int | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
