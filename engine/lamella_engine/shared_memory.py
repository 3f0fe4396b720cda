"""Files in shared memory, one copy for all processes of a host: filled once, kept while used, gone after the last user.

Owns the directory, the files' names and the locking; knows nothing of tensors, pinning or models. `ram_tier` stands on
it. The protocol, on files named by the content they hold::

    <key>.part   being filled by whoever holds its lock exclusively
    <key>        complete: a part file is renamed once every byte is in. Its users hold its lock shared.

All reference counting is the kernel's flock, which a killed process cannot keep:

* A part file that nobody locks was left by a dead filler; the next who needs it locks it and fills it anew, from the
  first byte.
* Whoever stops using a file, or looks for leftovers (`reclaim`), tries for the exclusive lock. Who gets it is the only
  one there, and unlinks.
* A lock is on a file, not on a name. Whoever gets one therefore looks whether the name still means that file, and
  begins again if not.

Space is reserved before a byte is written: a mapping of a file system that is full would end the process by SIGBUS.
A file in use takes two descriptors (Python's mapping keeps one of its own); the soft limit is raised as need be.
A child made by fork without exec holds its parent's locks as long as it lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import re
import resource
import stat
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lamella_engine.errors import EngineClosed
from lamella_engine.host_memory import require_available

logger = logging.getLogger(__name__)

Fill = Callable[[memoryview], object]  # what it returns is not looked at

FILL_WAIT_S = 300.0  # longer than any disk that is worth waiting for takes for one file
_PART = ".part"
_KEY = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,199}")
_OPEN_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05
_REMIND_S = 30.0
_SETTLE_S = 5.0  # to get the shared lock of one's own new file, which others hold for an instant while they look
_DESCRIPTORS_A_FILE = 2
_SPARE_DESCRIPTORS = 512  # for everything else the process has open


class SharedMemoryUnavailable(Exception):
    """Memory cannot be shared here, or not this much of it; the message says why and what to do."""


def default_directory() -> Path:
    """The directory that all processes of this user share on this host."""
    return Path("/dev/shm") / f"lamella-{os.getuid()}"


def is_shareable(key: str) -> bool:
    """Whether `key` can name a file: it begins with a letter or digit and has only these, ``-`` and ``_``."""
    return _KEY.fullmatch(key) is not None


def reclaim(directory: Path | None = None) -> int:
    """Remove the files in `directory` that no process uses; return the bytes freed.

    Files of other kinds are left alone; so is everything that is in use or being filled.
    """
    directory = default_directory() if directory is None else directory
    freed = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for name in os.listdir(directory):
            if is_shareable(name.removesuffix(_PART)):
                with contextlib.suppress(OSError):
                    freed += _remove_unless_used(directory / name)
    return freed


class SharedFile:
    """A complete file that this process uses: `mapping` is all of it. `release` belongs to its owner."""

    def __init__(self, path: Path, descriptor: int, mapping: mmap.mmap) -> None:
        self.path = path
        self.mapping = mapping
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Stop using the file, and remove it if nobody else does; the mapping lives as long as it is referenced."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            # Trying gives up the shared lock even where it fails, so of two who leave at once the second succeeds.
            if _try_lock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, self.path):
                self.path.unlink()
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # the mapping's own descriptor would keep the lock
            os.close(descriptor)


class SharedDirectory:
    """The directory of one user's shared files on one host; any number of processes and threads may use it at once.

    Opening it removes what dead processes left.

    Args:
        path: the directory; None means `default_directory`. Made if only its last part is missing.
        wait_s: how long to wait for another process that fills a file, in seconds.

    Raises:
        SharedMemoryUnavailable: nothing can be shared there.
    """

    def __init__(self, path: Path | None = None, *, wait_s: float = FILL_WAIT_S) -> None:
        self.path = default_directory() if path is None else path
        self._is_default = path is None
        self._wait_s = wait_s
        self._num_files = 0
        self._is_closed = False
        if sys.platform != "linux":
            raise SharedMemoryUnavailable(f"{sys.platform} has no memory that files can share")
        self._make()
        freed = reclaim(self.path)
        if freed:
            logger.info("removed %d bytes of shared memory in %s that dead processes left", freed, self.path)

    def acquire(self, key: str, nbytes: int, fill: Fill) -> SharedFile:
        """Use the file `key` of `nbytes` bytes; `fill` writes them all if no other process has or does.

        Raises:
            SharedMemoryUnavailable: there is no room, or the process that fills it takes longer than `wait_s`.
            DeviceError: the host's memory is too short for it.
            EngineClosed: after `close`.
        """
        if self._is_closed:
            raise EngineClosed(f"the shared memory in {self.path} was used after close()")
        assert is_shareable(key), f"{key!r} cannot name a file"
        assert nbytes > 0, "a file of no size"
        self._num_files += 1
        _allow_descriptors(_DESCRIPTORS_A_FILE * self._num_files + _SPARE_DESCRIPTORS)
        began = time.monotonic()
        remind_at, pause_s = began + _REMIND_S, _FIRST_PAUSE_S
        while (file := self._attach(key, nbytes) or self._fill(key, nbytes, fill)) is None:
            now = time.monotonic()
            if now - began >= self._wait_s:
                raise SharedMemoryUnavailable(
                    f"{self._user(key)} has been filling {self.path / key} for over {self._wait_s:.0f} s; "
                    "if it hangs, end it"
                )
            if now >= remind_at:
                logger.info("waiting for %s, which fills %s", self._user(key), self.path / key)
                remind_at += _REMIND_S
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return file

    def complete_bytes(self, keys: Iterable[str]) -> int:
        """Bytes of those of `keys` that some process has filled."""
        total = 0
        for key in filter(is_shareable, keys):
            with contextlib.suppress(OSError):
                total += (self.path / key).stat().st_size
        return total

    def close(self) -> None:
        """Refuse further use, and remove the default directory if it is empty; files in use stay. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            if self._is_default:
                with contextlib.suppress(OSError):
                    self.path.rmdir()

    def _make(self) -> None:
        try:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
            found = self.path.lstat()
        except OSError as error:
            raise SharedMemoryUnavailable(f"{self.path} cannot be made ({error.strerror})") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise SharedMemoryUnavailable(f"{self.path} is not a directory that only this user can write to")

    def _attach(self, key: str, nbytes: int) -> SharedFile | None:
        """The complete file, with its lock held shared; None if there is none, or if it is going away."""
        path = self.path / key
        try:
            descriptor = os.open(path, _OPEN_FLAGS)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SharedMemoryUnavailable(f"{path} cannot be opened ({error.strerror})") from error
        try:
            if _try_lock(descriptor, fcntl.LOCK_SH) and _is_at(descriptor, path):
                size = os.fstat(descriptor).st_size
                if size == nbytes:
                    return SharedFile(path, descriptor, _map(descriptor, nbytes, path))
                if not (_try_lock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, path)):
                    raise SharedMemoryUnavailable(f"{path} has {size} bytes where {nbytes} were expected")
                path.unlink()
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _fill(self, key: str, nbytes: int, fill: Fill) -> SharedFile | None:
        """Fill the file unless somebody else does or has; None means to look again."""
        part = self.path / (key + _PART)
        descriptor = self._open_part(part)
        try:
            is_ours = _try_lock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, part)
            if is_ours:
                file = self._fill_locked(descriptor, part, nbytes, fill)
                if file is not None:
                    return file
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _open_part(self, part: Path) -> int:
        try:
            try:
                return os.open(part, _OPEN_FLAGS | os.O_CREAT, 0o600)
            except FileNotFoundError:  # another process was the last to leave the default directory
                self._make()
                return os.open(part, _OPEN_FLAGS | os.O_CREAT, 0o600)
        except OSError as error:
            raise SharedMemoryUnavailable(f"{part} cannot be made ({error.strerror})") from error

    def _fill_locked(self, descriptor: int, part: Path, nbytes: int, fill: Fill) -> SharedFile | None:
        path = part.with_name(part.name.removesuffix(_PART))
        try:
            if path.exists():  # completed between looking for it and getting the lock
                part.unlink()
                return None
            _reserve(descriptor, nbytes, self.path)
            # Mapping all pages at once: faulting them in one by one makes filling twice as slow (3.6 s against 1.8 s a
            # GiB on a virtual machine with 4 KiB pages).
            mapping = _map(descriptor, nbytes, part, mmap.MAP_POPULATE)
            fill(memoryview(mapping))
            part.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        deadline = time.monotonic() + _SETTLE_S
        while not _try_lock(descriptor, fcntl.LOCK_SH):
            if time.monotonic() >= deadline:
                return None
            time.sleep(_FIRST_PAUSE_S)
        # flock does not promise to change its kind in one step: somebody may have removed the file in between.
        return SharedFile(path, descriptor, mapping) if _is_at(descriptor, path) else None

    def _user(self, key: str) -> str:
        """Who holds the lock of the file or its part, as far as the kernel tells."""
        for name in (key + _PART, key):
            with contextlib.suppress(OSError):
                found = (self.path / name).stat()
                number = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
                for line in Path("/proc/locks").read_text().splitlines():
                    words = line.split()
                    if words[1] == "FLOCK" and words[5] == number:
                        return f"process {words[4]}"
        return "another process"


def _reserve(descriptor: int, nbytes: int, directory: Path) -> None:
    """Have every byte of the file in memory, or say that there is no room."""
    require_available(nbytes)
    try:
        os.ftruncate(descriptor, nbytes)
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        space = os.statvfs(directory)
        raise SharedMemoryUnavailable(
            f"{directory} has no room for {nbytes:,} bytes ({error.strerror}; {space.f_bavail * space.f_frsize:,} "
            "are free). Enlarge it (in a container --shm-size or --ipc=host), or name another directory"
        ) from error


def _map(descriptor: int, nbytes: int, path: Path, flags: int = 0) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED | flags)
    except OSError as error:
        raise SharedMemoryUnavailable(f"{path} cannot be mapped ({error.strerror})") from error


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the name `path` still means the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _remove_unless_used(path: Path) -> int:
    descriptor = os.open(path, _OPEN_FLAGS)
    try:
        if not _try_lock(descriptor, fcntl.LOCK_EX) or not _is_at(descriptor, path):
            return 0
        nbytes = os.fstat(descriptor).st_blocks * 512
        path.unlink()
        return nbytes
    finally:
        os.close(descriptor)


def _allow_descriptors(count: int) -> None:
    """Raise this process's soft limit of open files to `count` where the hard limit lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
