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
from lamella_engine.experts import Range
from lamella_engine.file_reads import ALIGNMENT, STALL_S, ReadStyle, ShardFile, aligned_range
from lamella_engine.host_memory import HostMemory
from lamella_engine.pieces import Piece
from lamella_engine.timeline import Lane, Timeline

ALL_TOKENS = 1 << 30  # a sweep of so many visits every expert
_POLL_S = 0.2  # how soon a waiting thread notices that it should stop


@dataclass
class RingSlot:
    """One part of the ring; `until_free` returns once a copy out of it has ended (None: nothing to wait for)."""

    tensor: torch.Tensor
    view: memoryview
    until_free: Callable[[], None] | None = None
    is_urgent: bool = False  # kept for what is fetched on demand


@dataclass
class FilledChunk:
    """Bytes `offset` to ``offset + nbytes`` of piece number `piece`, at `tensor` in the ring.

    `is_sparse` says that the piece comes without its experts, `is_last` that nothing of it follows.
    """

    piece: int
    offset: int
    nbytes: int
    slot: RingSlot
    skip: int
    pending: int  # blocks not read yet
    is_sparse: bool = False
    is_last: bool = True
    began_s: float = field(default=0.0)

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes, uint8 [nbytes]."""
        return self.slot.tensor[self.skip : self.skip + self.nbytes]


class _Part(NamedTuple):
    """What one chunk is to hold: bytes of a piece, of which `ranges` are read."""

    piece: int
    offset: int
    nbytes: int
    ranges: tuple[Range, ...]
    is_sparse: bool
    is_last: bool


class _Block(NamedTuple):
    chunk: FilledChunk
    at: int  # in the slot
    length: int
    needed: int
    start: int  # in the file


def slot_bytes(pieces: Sequence[Piece], chunk_bytes: int, *, passes_on: bool) -> int:
    """Bytes of ring that one chunk of at most `chunk_bytes` takes, with what reading whole pages adds.

    Chunks begin on a page where pieces do, unless they are parts of one whose experts are fetched to be passed on.
    """
    is_aligned = all(piece.start % ALIGNMENT == 0 and not (passes_on and piece.experts) for piece in pieces)
    return -(-chunk_bytes // ALIGNMENT) * ALIGNMENT + (0 if is_aligned else ALIGNMENT)


class DiskReader:
    """The threads that fill the ring; `next_filled` and `give_back` belong to one consumer thread.

    `start` and `stop` come in pairs and may be repeated: each start begins again at the first piece. The ring's memory
    belongs to the caller and must outlive the reader.

    Args:
        pieces: what lives on disk, in sweep order.
        memory: the ring; holds at least one chunk, two where experts are fetched to a device.
        chunk_bytes: a chunk's size at most, a multiple of 4096 unless it covers every piece.
        style: how many threads read how much at once.
        timeline: told of every read.
        passes_on: chunks are copied on to a device, and experts are had by `fetch`; else they are computed from where
            they are, and had by `fill`.
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
        *,
        passes_on: bool = False,
    ) -> None:
        self._pieces = tuple(pieces)
        self._chunk_bytes = chunk_bytes
        self._style = style
        self._timeline = timeline
        open_file = open_file or (lambda path: ShardFile(path, direct=style.direct))
        size = slot_bytes(pieces, chunk_bytes, passes_on=passes_on)
        self._slots = [
            RingSlot(memory.tensor[at : at + size], memory.view[at : at + size])
            for at in range(0, memory.nbytes // size * size, size)
        ]
        # What is fetched on demand has slots of its own: the others may all be full, waiting for who waits for this.
        is_fetching = passes_on and any(piece.experts is not None for piece in pieces)
        num_urgent = max(1, len(self._slots) // 4) if is_fetching else 0
        self._urgent_slots, self._slots = self._slots[:num_urgent], self._slots[num_urgent:]
        for slot in self._urgent_slots:
            slot.is_urgent = True
        self._passes_on = passes_on
        self._tokens = ALL_TOKENS
        self._changed = threading.Condition()
        self._is_stopping = False
        self._failure: Exception | None = None
        self._threads: list[threading.Thread] = []
        self._files: dict[Path, ShardFile] = {}
        self._free: deque[RingSlot] = deque()
        self._urgent_free: deque[RingSlot] = deque()
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
        self._free, self._urgent_free = deque(self._slots), deque(self._urgent_slots)
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
        self._slots, self._urgent_slots = [], []
        self._free, self._urgent_free, self._filling, self._blocks = deque(), deque(), deque(), deque()
        while self._files:
            self._files.popitem()[1].close()

    def expect(self, tokens: int) -> None:
        """Say how many tokens the next sweeps carry: with few, pieces come without experts. Any thread may call."""
        self._tokens = tokens

    def next_filled(self) -> FilledChunk:
        """The next chunk, in sweep order.

        Raises:
            ShardError: a shard could not be read whole.
            EngineError: nothing came within `STALL_S`, or the reader was stopped meanwhile.
        """
        with self._changed:
            self._wait_for(lambda: bool(self._filling) and self._filling[0].pending == 0)
            return self._filling.popleft()

    def give_back(self, chunk: FilledChunk, until_free: Callable[[], None] | None = None) -> None:
        """Let the chunk's part of the ring be filled again, once `until_free` has returned."""
        chunk.slot.until_free = until_free
        with self._changed:
            (self._urgent_free if chunk.slot.is_urgent else self._free).append(chunk.slot)
            self._changed.notify_all()  # somebody who fetches may wait beside the reading threads

    def fill(self, held: FilledChunk, ranges: Sequence[Range]) -> None:
        """Read `ranges` of the piece in `held`, a whole piece, to their places in it, before anything else.

        Raises:
            As `next_filled`.
        """
        part = _Part(held.piece, 0, held.nbytes, tuple(ranges), is_sparse=True, is_last=True)
        with self._changed:
            chunk = self._begin_part(part, held.slot, is_urgent=True)
            self._wait_for(lambda: chunk.pending == 0)

    def fetch(self, piece: int, ranges: Sequence[Range]) -> Iterator[FilledChunk]:
        """Read `ranges` of piece number `piece` before anything else; each chunk is to be given back.

        Raises:
            As `next_filled`.
        """
        waiting = deque(self._cut(piece, ranges, is_sparse=True))
        under_way: deque[FilledChunk] = deque()
        while waiting or under_way:
            with self._changed:
                while waiting and self._urgent_free:
                    slot = self._urgent_free.popleft()
                    under_way.append(self._begin_part(waiting.popleft(), slot, is_urgent=True))
                self._wait_for(lambda: under_way[0].pending == 0)
            yield under_way.popleft()

    def _wait_for(self, is_there: Callable[[], bool]) -> None:
        """Wait until `is_there`, holding the lock."""
        arrived = self._changed.wait_for(
            lambda: self._failure is not None or self._is_stopping or is_there(), timeout=STALL_S
        )
        if self._failure is not None:
            raise self._failure
        if self._is_stopping:
            raise EngineError("the reader was stopped")
        if not arrived:
            raise EngineError(f"nothing was read within {STALL_S:.0f} s: the disk under the shards stalls")

    def _all_parts(self) -> Iterator[_Part]:
        """What every chunk is to hold, for ever."""
        while True:
            for number, piece in enumerate(self._pieces):
                is_sparse = piece.experts is not None and piece.experts.is_sparse(self._tokens)
                ranges = piece.ranges(is_sparse=is_sparse)
                if piece.nbytes <= self._chunk_bytes and not (is_sparse and self._passes_on):
                    yield _Part(number, 0, piece.nbytes, tuple(ranges), is_sparse, is_last=True)
                else:
                    yield from self._cut(number, ranges, is_sparse=is_sparse)

    def _cut(self, piece: int, ranges: Sequence[Range], *, is_sparse: bool) -> Iterator[_Part]:
        """`ranges` of a piece in parts that fit a chunk."""
        step = self._chunk_bytes
        cut = [(offset + at, min(step, nbytes - at)) for offset, nbytes in ranges for at in range(0, nbytes, step)]
        for number, (offset, nbytes) in enumerate(cut, 1):
            yield _Part(piece, offset, nbytes, ((offset, nbytes),), is_sparse, number == len(cut))

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
        self._filling.append(self._begin_part(next(self._parts), self._free.popleft(), is_urgent=False))

    def _begin_part(self, part: _Part, slot: RingSlot, *, is_urgent: bool) -> FilledChunk:
        """Line up the blocks of `part`, before all others if it is urgent."""
        start, step = self._pieces[part.piece].start, self._style.block_bytes
        low, _, skip = aligned_range(start + part.offset, part.nbytes)
        chunk = FilledChunk(part.piece, part.offset, part.nbytes, slot, skip, 0, part.is_sparse, part.is_last)
        blocks = []
        for offset, nbytes in part.ranges:
            first, length, lead = aligned_range(start + offset, nbytes)
            for at in range(0, length, step):
                here = min(step, length - at)
                blocks.append(_Block(chunk, first - low + at, here, min(here, lead + nbytes - at), first + at))
        chunk.pending, chunk.began_s = len(blocks), time.perf_counter()
        if is_urgent:
            self._blocks.extendleft(reversed(blocks))
        else:
            self._blocks.extend(blocks)
        self._changed.notify_all()
        return chunk

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
