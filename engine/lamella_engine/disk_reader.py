"""Reads the pieces that live on disk ahead of the sweep, round and round, into a ring of host memory.

Owns the reading threads, the open files and the order of the ring. The order of pieces is fixed and cyclic, so the
first ones of the next sweep are being read while the last part of this one computes. A piece is read in chunks: the
whole piece where it is computed from the ring itself, some MiB where the ring only passes bytes on to a device.
Knows nothing of devices: whoever gives a slot back says what to wait for before it is filled again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from lamella_engine.errors import EngineError, ShardError
from lamella_engine.file_reads import ALIGNMENT, STALL_S, ReadStyle, ShardFile, aligned_range
from lamella_engine.host_memory import HostMemory
from lamella_engine.pieces import Piece
from lamella_engine.timeline import Lane, Timeline

_POLL_S = 0.2  # how soon a waiting thread notices that it should stop


@dataclass
class RingSlot:
    """One part of the ring; `until_free` returns once a copy out of it has ended (None: nothing to wait for)."""

    tensor: torch.Tensor
    view: memoryview
    until_free: Callable[[], None] | None = None


@dataclass
class FilledChunk:
    """Bytes `offset` to ``offset + nbytes`` of piece number `piece`, at `tensor` in the ring."""

    piece: int
    offset: int
    nbytes: int
    slot: RingSlot
    skip: int
    pending: int  # blocks not read yet
    began_s: float = field(default=0.0)

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes, uint8 [nbytes]."""
        return self.slot.tensor[self.skip : self.skip + self.nbytes]


class _Block(NamedTuple):
    chunk: FilledChunk
    at: int  # in the slot
    length: int
    needed: int
    start: int  # in the file


def slot_bytes(pieces: Sequence[Piece], chunk_bytes: int) -> int:
    """Bytes of ring that one chunk of at most `chunk_bytes` takes, with what reading whole pages adds."""
    is_aligned = all(piece.start % ALIGNMENT == 0 for piece in pieces)
    return -(-chunk_bytes // ALIGNMENT) * ALIGNMENT + (0 if is_aligned else ALIGNMENT)


class DiskReader:
    """The threads that fill the ring; `next_filled` and `give_back` belong to one consumer thread.

    `start` and `stop` come in pairs and may be repeated: each start begins again at the first piece. The ring's memory
    belongs to the caller and must outlive the reader.

    Args:
        pieces: what lives on disk, in sweep order.
        memory: the ring; holds at least one chunk.
        chunk_bytes: a chunk's size at most, a multiple of 4096 unless it covers every piece.
        style: how many threads read how much at once.
        timeline: told of every read.
        open_file: opens a shard file; None means as `style` says.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        memory: HostMemory,
        chunk_bytes: int,
        style: ReadStyle,
        timeline: Timeline,
        open_file: Callable[[Path], ShardFile] | None = None,
    ) -> None:
        self._pieces = tuple(pieces)
        self._chunk_bytes = chunk_bytes
        self._style = style
        self._timeline = timeline
        open_file = open_file or (lambda path: ShardFile(path, direct=style.direct))
        size = slot_bytes(pieces, chunk_bytes)
        self._slots = [
            RingSlot(memory.tensor[at : at + size], memory.view[at : at + size])
            for at in range(0, memory.nbytes // size * size, size)
        ]
        self._changed = threading.Condition()
        self._is_stopping = False
        self._failure: Exception | None = None
        self._threads: list[threading.Thread] = []
        self._files: dict[Path, ShardFile] = {}
        self._free: deque[RingSlot] = deque()
        self._filling: deque[FilledChunk] = deque()
        self._blocks: deque[_Block] = deque()
        try:
            for path in dict.fromkeys(piece.path for piece in self._pieces):
                self._files[path] = open_file(path)
        except BaseException:
            self.close()
            raise

    @property
    def is_direct(self) -> bool:
        """Whether the disk is read past the file cache."""
        return all(file.is_direct for file in self._files.values())

    def start(self) -> None:
        """Begin reading at the first piece."""
        if self._threads:
            raise EngineError("the reader runs already")
        self._is_stopping, self._failure = False, None
        self._free = deque(self._slots)
        self._filling = deque()
        self._parts = self._all_parts()
        self._blocks = deque()
        self._num_reading, self._reading_since = 0, 0.0
        self._threads = [
            threading.Thread(target=self._run, name=f"lamella-reader-{number}", daemon=True)
            for number in range(self._style.depth)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop reading and forget what was read ahead; idempotent."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        deadline = time.monotonic() + STALL_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise EngineError(f"the reader did not stop within {STALL_S:.0f} s: the disk does not answer")
        self._threads = []

    def close(self) -> None:
        """Stop, close the shard files and let go of the ring; idempotent."""
        self.stop()
        self._slots = []
        self._free, self._filling, self._blocks = deque(), deque(), deque()
        while self._files:
            self._files.popitem()[1].close()

    def next_filled(self) -> FilledChunk:
        """The next chunk, in sweep order.

        Raises:
            ShardError: a shard could not be read whole.
            EngineError: nothing came within `STALL_S`, or the reader was stopped meanwhile.
        """
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: self._failure or self._is_stopping or (self._filling and self._filling[0].pending == 0),
                timeout=STALL_S,
            )
            if self._failure is not None:
                raise self._failure
            if self._is_stopping:
                raise EngineError("the reader was stopped")
            if not arrived:
                raise EngineError(f"nothing was read within {STALL_S:.0f} s: the disk under the shards stalls")
            return self._filling.popleft()

    def give_back(self, chunk: FilledChunk, until_free: Callable[[], None] | None = None) -> None:
        """Let the chunk's part of the ring be filled again, once `until_free` has returned."""
        chunk.slot.until_free = until_free
        with self._changed:
            self._free.append(chunk.slot)
            self._changed.notify()

    def _all_parts(self) -> Iterator[tuple[int, int, int]]:
        """Piece number, offset and length of every chunk, for ever."""
        while True:
            for number, piece in enumerate(self._pieces):
                for offset in range(0, piece.nbytes, self._chunk_bytes):
                    yield number, offset, min(self._chunk_bytes, piece.nbytes - offset)

    def _run(self) -> None:
        try:
            while (block := self._take_block()) is not None:
                slot = block.chunk.slot
                if slot.until_free is not None:
                    slot.until_free()
                self._begin()
                file = self._files[self._pieces[block.chunk.piece].path]
                file.read(slot.view[block.at : block.at + block.length], block.start, block.needed)
                self._finish(block)
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits for the bytes
            failure = error if isinstance(error, ShardError) else ShardError(f"reading the shards failed: {error}")
            with self._changed:
                self._failure = self._failure or failure
                self._is_stopping = True
                self._changed.notify_all()

    def _take_block(self) -> _Block | None:
        """The next block to read, once the ring has room; None when the reader stops."""
        with self._changed:
            while not self._is_stopping:
                if self._blocks or self._free:
                    if not self._blocks:
                        self._open_chunk()
                    return self._blocks.popleft()
                self._changed.wait(timeout=_POLL_S)
        return None

    def _begin(self) -> None:
        with self._changed:
            if self._num_reading == 0:
                self._reading_since = time.perf_counter()
            self._num_reading += 1

    def _open_chunk(self) -> None:
        number, offset, nbytes = next(self._parts)
        low, length, skip = aligned_range(self._pieces[number].start + offset, nbytes)
        step = self._style.block_bytes
        chunk = FilledChunk(number, offset, nbytes, self._free.popleft(), skip, -(-length // step))
        chunk.began_s = time.perf_counter()
        self._filling.append(chunk)
        for at in range(0, length, step):
            here = min(step, length - at)
            self._blocks.append(_Block(chunk, at, here, min(here, skip + nbytes - at), low + at))
        self._changed.notify_all()

    def _finish(self, block: _Block) -> None:
        now = time.perf_counter()
        chunk = block.chunk
        with self._changed:
            self._num_reading -= 1
            self._timeline.add_read_s(now - self._reading_since)
            self._reading_since = now
            chunk.pending -= 1
            if chunk.pending:
                return
            self._timeline.add(Lane.READ, self._pieces[chunk.piece].name, chunk.began_s, now)
            self._changed.notify_all()
