"""Host memory that weights lie in: page-aligned, of exact size, known to the CUDA driver where it has to be.

Owns mappings, their registration with the driver and the count of pinned bytes. Does not know what is in them:
`disk_reader` fills the ring, `ram_tier` holds pieces, `shared_memory` supplies mappings that several processes share.
torch's own pinned allocator is not used: it rounds sizes up to powers of two and keeps what is freed.

Rule for tensors: a mapping is never unmapped while a tensor or view of it is alive, so `HostMemory.close` may come at
any time. It ends the pinning at once, so no copy to or from a device may be in flight then; the pages go back to the
system when the last tensor is gone.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
from types import TracebackType
from typing import Protocol, SupportsInt

import torch

from lamella_engine.device import available_host_bytes
from lamella_engine.errors import DeviceError, EngineClosed

logger = logging.getLogger(__name__)

_SUCCESS = 0
_REGISTER_FLAGS = 0  # plain: with unified addressing every device of the process sees the range as pinned


class _Driver(Protocol):
    """The calls of the CUDA runtime that pin memory; a code is 0 where all went well."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int, /) -> SupportsInt: ...

    def cudaHostUnregister(self, address: int, /) -> SupportsInt: ...

    def cudaGetErrorString(self, code: SupportsInt, /) -> str: ...


class _PinnedRanges:
    """What this process has registered with the driver: address to mapping. Any thread may change it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mappings: dict[int, mmap.mmap] = {}
        self._nbytes = 0
        self._peak = 0

    @property
    def nbytes(self) -> int:
        """Bytes registered now."""
        return self._nbytes

    @property
    def peak(self) -> int:
        """The most bytes registered at any time."""
        return self._peak

    def add(self, address: int, mapping: mmap.mmap) -> None:
        """Note a registered mapping; holding it here keeps it mapped until the driver has let go of it."""
        with self._lock:
            self._mappings[address] = mapping
            self._nbytes += len(mapping)
            self._peak = max(self._peak, self._nbytes)

    def discard(self, address: int) -> None:
        """Note that the driver has let go of the mapping at `address`."""
        with self._lock:
            self._nbytes -= len(self._mappings.pop(address))


_pinned = _PinnedRanges()


def pinned_bytes() -> int:
    """Bytes of host memory that this process has registered with the CUDA driver now.

    The driver pins whole pages: for each mapping, up to a page less one byte more than counted.
    """
    return _pinned.nbytes


def peak_pinned_bytes() -> int:
    """The most bytes that this process has had registered with the CUDA driver at once."""
    return _pinned.peak


def register_mapping(mapping: mmap.mmap) -> None:
    """Pin the whole of `mapping` for the device that is current in this thread.

    Make the device current first (``with torch.cuda.device(...)``), or the driver opens a context on another card.

    Raises:
        DeviceError: there is no CUDA device, or its driver refuses.
    """
    if not torch.cuda.is_available():
        raise DeviceError(
            f"cannot pin {len(mapping):,} bytes of host memory: torch {torch.__version__} sees no CUDA device here. "
            "Use --device cpu, or install a torch build that matches the driver (`lamella doctor` tells)."
        )
    address = _address(mapping)
    driver = _driver()
    code = driver.cudaHostRegister(address, len(mapping), _REGISTER_FLAGS)
    if int(code) != _SUCCESS:
        _take_last_error()
        raise DeviceError(
            f"cannot pin {len(mapping):,} bytes of host memory beside the {pinned_bytes():,} that are pinned: the CUDA "
            f"driver says {driver.cudaGetErrorString(code)} (code {int(code)}). Give a smaller RAM budget (--ram), or "
            "let the worker lock more memory (ulimit -l unlimited; in a container --ulimit memlock=-1)."
        )
    _pinned.add(address, mapping)


def unregister_mapping(mapping: mmap.mmap) -> None:
    """Undo `register_mapping`; no copy to or from the mapping may be in flight.

    A driver that refuses (after a failed kernel, say) is logged, and the mapping stays for the life of the process.
    """
    address = _address(mapping)
    driver = _driver()
    code = driver.cudaHostUnregister(address)
    if int(code) == _SUCCESS:
        _pinned.discard(address)
    else:
        reason = driver.cudaGetErrorString(code)
        logger.warning("%d bytes of host memory stay pinned: the CUDA driver says %s", len(mapping), reason)


def require_available(nbytes: int) -> None:
    """Refuse to take `nbytes` of host memory that the kernel could only find by killing a process.

    Raises:
        DeviceError: less is available to this process.
    """
    available = available_host_bytes()
    if nbytes > available:
        raise DeviceError(
            f"{nbytes:,} bytes of host memory are wanted and {available:,} are available (by the kernel's count and "
            "the memory limit of this process's control group). Give a smaller RAM budget (--ram), or raise that limit."
        )


class HostMemory:
    """`nbytes` bytes of page-aligned memory of this process alone, all zero at first.

    One owner closes it, any thread may use `tensor` and `view`, which are the same bytes. While it is pinned, a forked
    child does not have the pages: a copy-on-write would part this process from what the device reads.

    Args:
        nbytes: exact size, above 0.
        pinned: register it with the driver of the CUDA device that is current in this thread.

    Raises:
        DeviceError: the host has not so much memory available, or the driver refuses to pin it.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        assert nbytes > 0, "host memory of no size"
        require_available(nbytes)
        try:
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise DeviceError(
                f"cannot take {nbytes:,} bytes of host memory: {error.strerror}. Give a smaller RAM budget (--ram)."
            ) from error
        if pinned and hasattr(mmap, "MADV_DONTFORK"):
            mapping.madvise(mmap.MADV_DONTFORK)
        self._adopt(mapping, pinned)

    @classmethod
    def from_mapping(cls, mapping: mmap.mmap, *, pinned: bool = False) -> HostMemory:
        """The memory of a mapping made elsewhere, such as one that other processes map too.

        Raises:
            DeviceError: the driver refuses to pin it.
        """
        memory = cls.__new__(cls)
        memory._adopt(mapping, pinned)
        return memory

    def _adopt(self, mapping: mmap.mmap, pinned: bool) -> None:
        self.nbytes = len(mapping)
        self.is_pinned = pinned
        if pinned:
            register_mapping(mapping)
        self._mapping: mmap.mmap | None = mapping
        self._tensor = _as_tensor(mapping)

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes, uint8 [nbytes], page-aligned.

        Raises:
            EngineClosed: after `close`.
        """
        self._open_mapping()
        return self._tensor

    @property
    def view(self) -> memoryview:
        """The same bytes, writable.

        Raises:
            EngineClosed: after `close`.
        """
        return memoryview(self._open_mapping())

    def close(self) -> None:
        """End the pinning and let go of the memory, see the rule at the top of this file; idempotent."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        self._tensor = torch.empty(0, dtype=torch.uint8)
        if self.is_pinned:
            unregister_mapping(mapping)

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open_mapping(self) -> mmap.mmap:
        if self._mapping is None:
            raise EngineClosed(f"these {self.nbytes:,} bytes of host memory were used after close()")
        return self._mapping


def _driver() -> _Driver:
    driver: _Driver = torch.cuda.cudart()  # type: ignore[no-untyped-call] # torch does not annotate it
    return driver


def _take_last_error() -> None:
    """Launch something small: the runtime keeps a failed call's error for the next launch, which would be blamed."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch does not annotate it
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")


def _as_tensor(mapping: mmap.mmap) -> torch.Tensor:
    # torch holds on to the mapping object, not to its buffer, so nobody may ever call mapping.close().
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _address(mapping: mmap.mmap) -> int:
    return _as_tensor(mapping).data_ptr()
