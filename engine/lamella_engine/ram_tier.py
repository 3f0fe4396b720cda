"""The RAM tier: whole pieces of a model in host memory, one copy for all workers of a host where that is possible.

Owns the pieces this process holds and whether they are pinned. `shared_memory` keeps the one copy and counts who uses
it, `host_memory` pins; reading the bytes is the caller's business. Where memory cannot be shared (no /dev/shm, too
small, another system) a piece is held by this process alone, which is logged and changes nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from lamella_engine.errors import EngineClosed, EngineError
from lamella_engine.host_memory import HostMemory
from lamella_engine.shared_memory import (
    FILL_WAIT_S,
    Fill,
    SharedDirectory,
    SharedFile,
    SharedMemoryUnavailable,
    is_shareable,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _HeldPiece:
    """One piece: its memory, and the file behind it if other processes may share it."""

    memory: HostMemory
    file: SharedFile | None

    def close(self) -> None:
        try:
            self.memory.close()
        finally:
            if self.file is not None:
                self.file.release()


class RamTier:
    """Pieces in host memory, by key. Threads may load different pieces at once; one owner closes.

    Args:
        directory: directory in memory to share in; None means the user's own under /dev/shm.
        pinned: register every piece with the driver of the CUDA device that is current in the loading thread.
        wait_s: how long to wait for another process that fills a piece, before this one takes a copy of its own.
    """

    def __init__(self, directory: Path | None = None, *, pinned: bool, wait_s: float = FILL_WAIT_S) -> None:
        self._pinned = pinned
        self._wait_s = wait_s
        self._changed = threading.Condition()
        self._pieces: dict[str, _HeldPiece] = {}
        self._loading: set[str] = set()
        self._is_closed = False
        self._has_warned = False
        self._directory: SharedDirectory | None = None
        try:
            self._directory = SharedDirectory(directory, wait_s=wait_s)
        except SharedMemoryUnavailable as reason:
            self._warn(reason)

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces this process holds, shared or not."""
        with self._changed:
            return sum(piece.memory.nbytes for piece in self._pieces.values())

    @property
    def shared_bytes(self) -> int:
        """Bytes of the pieces that other processes can use too."""
        with self._changed:
            return sum(piece.memory.nbytes for piece in self._pieces.values() if piece.file is not None)

    def load(self, key: str, nbytes: int, fill: Fill) -> torch.Tensor:
        """The piece `key`, held from now on: uint8 [nbytes], page-aligned, not to be written to.

        Args:
            key: names the content, and nothing but this content; one that begins with neither letter nor digit, or has
                others than these, ``-`` and ``_``, is not shared.
            nbytes: exact size.
            fill: writes all `nbytes` bytes; called only if no process of this host holds the piece. No thread may
                write to its argument after it has returned or raised.

        Raises:
            DeviceError: the host's memory is too short, or the driver refuses to pin.
            EngineClosed: after `close`.
            Exception: whatever `fill` raises; nothing is left behind then.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: key not in self._loading, timeout=self._wait_s):
                raise EngineError(f"another thread has been loading {key} for over {self._wait_s:.0f} s")
            self._check_open()
            held = self._pieces.get(key)
            if held is not None:
                assert held.memory.nbytes == nbytes, f"{key} has {held.memory.nbytes} bytes, {nbytes} were asked for"
                return held.memory.tensor
            self._loading.add(key)
        try:
            piece = self._take(key, nbytes, fill)
            with self._changed:
                if not self._is_closed:
                    self._pieces[key] = piece
                    return piece.memory.tensor
            piece.close()
        finally:
            with self._changed:
                self._loading.discard(key)
                self._changed.notify_all()
        raise EngineClosed(f"the RAM tier was closed while {key} was loaded")

    def held_bytes(self, keys: Iterable[str]) -> int:
        """Bytes of those of `keys` that are complete in this host's shared memory, whoever holds them."""
        return 0 if self._directory is None else self._directory.complete_bytes(keys)

    def close(self) -> None:
        """Let go of all pieces, and remove those that no other process uses; idempotent.

        Tensors stay readable as long as they live, but not pinned: no copy out of them may be in flight.
        """
        with self._changed:
            self._is_closed = True
            pieces, self._pieces = list(self._pieces.values()), {}
        with contextlib.ExitStack() as closing:
            if self._directory is not None:
                closing.callback(self._directory.close)
            for piece in pieces:
                closing.callback(piece.close)

    def __enter__(self) -> RamTier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineClosed("the RAM tier was used after close()")

    def _take(self, key: str, nbytes: int, fill: Fill) -> _HeldPiece:
        if self._directory is not None and is_shareable(key):
            try:
                file = self._directory.acquire(key, nbytes, fill)
            except SharedMemoryUnavailable as reason:
                self._warn(reason)
            else:
                return _pin_shared(file, self._pinned)
        memory = HostMemory(nbytes, pinned=self._pinned)
        try:
            fill(memory.view)
        except BaseException:
            memory.close()
            raise
        return _HeldPiece(memory, None)

    def _warn(self, reason: SharedMemoryUnavailable) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning("this worker keeps weights in memory of its own, not shared with others: %s", reason)


def _pin_shared(file: SharedFile, pinned: bool) -> _HeldPiece:
    try:
        return _HeldPiece(HostMemory.from_mapping(file.mapping, pinned=pinned), file)
    except BaseException:
        file.release()
        raise
