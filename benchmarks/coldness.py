"""Cold or warm, by proof: drops files from the file cache and counts the bytes that really came from a disk.

Three witnesses, each of which may be missing: the disk's own counters (/proc/diskstats), this process's
(/proc/self/io), and the share of the files that is in the file cache. A figure is called cold or warm only where a
witness says so. Neighbours: `peers` and `lamella_run` ask before and after what they time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import proc_field, proc_lines

SECTOR_BYTES = 512  # the unit of /proc/diskstats, whatever the disk's own
COLD_SHARE = 0.9  # of the bytes that had to be read
WARM_SHARE = 0.05


@dataclass(frozen=True)
class ReadCount:
    """Bytes read so far; None where the machine does not tell."""

    disk: int | None
    process: int | None


class DiskWitness:
    """Counts reads of the disk under a path, and of this process."""

    def __init__(self, path: Path) -> None:
        number = os.stat(path).st_dev
        self.device = _device_name(os.major(number), os.minor(number))
        self._key = (str(os.major(number)), str(os.minor(number)))

    def count(self) -> ReadCount:
        """What has been read up to now."""
        return ReadCount(self._disk_bytes(), _process_bytes())

    def _disk_bytes(self) -> int | None:
        if self.device is None:
            return None
        for line in proc_lines("/proc/diskstats"):
            fields = line.split()
            if (fields[0], fields[1]) == self._key:
                return int(fields[5]) * SECTOR_BYTES
        return None


@dataclass(frozen=True)
class Proof:
    """What was read between two counts, against what had to be read if nothing was cached."""

    label: str  # cold, warm, mixed or unproven
    expected_bytes: int
    disk_bytes: int | None
    process_bytes: int | None
    note: str


def prove(before: ReadCount, after: ReadCount, expected_bytes: int) -> Proof:
    """Say whether what happened between two counts was cold or warm.

    `expected_bytes` is what a run that finds nothing in the file cache has to read. The process's own count decides,
    since the disk's also counts its neighbours; a count that has stood at 0 since the process began is not believed.
    """
    disk = _difference(before.disk, after.disk)
    process = _difference(before.process, after.process)
    if expected_bytes <= 0:
        return Proof("warm", expected_bytes, disk, process, "nothing had to be read")
    witness = process if after.process else disk if after.disk else None
    if witness is None:
        return Proof("unproven", expected_bytes, disk, process, "this machine counts no reads for the path")
    share = witness / expected_bytes
    if share >= COLD_SHARE:
        return Proof("cold", expected_bytes, disk, process, "")
    if share <= WARM_SHARE:
        return Proof("warm", expected_bytes, disk, process, "")
    return Proof("mixed", expected_bytes, disk, process, f"{share:.0%} of the bytes came from the disk")


def drop_file_cache(paths: Iterable[Path]) -> None:
    """Ask the system to forget the cached pages of `paths`; pages that are mapped or not yet written stay."""
    for path in paths:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def cached_share(paths: Iterable[Path]) -> float | None:
    """The share of the files' pages that are in the file cache; None where the system does not tell."""
    cached = pages = 0
    for path in paths:
        counted = _cached_pages(path)
        if counted is None:
            return None
        cached, pages = cached + counted[0], pages + counted[1]
    return cached / pages if pages else None


def _cached_pages(path: Path) -> tuple[int, int] | None:
    size = path.stat().st_size
    if size == 0:
        return 0, 0
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):
        return None
    count = -(-size // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * count)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapped:
        anchor = ctypes.c_char.from_buffer(mapped)
        try:
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), present)
        finally:
            del anchor
    return None if failed else (sum(flag & 1 for flag in present), count)


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _device_name(major: int, minor: int) -> str | None:
    for line in proc_lines("/proc/diskstats"):
        fields = line.split()
        if fields[:2] == [str(major), str(minor)]:
            return fields[2]
    return None


def _process_bytes() -> int | None:
    value = proc_field("/proc/self/io", "read_bytes")
    return int(value) if value is not None else None
