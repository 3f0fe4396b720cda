"""Brings the pieces of a model to where they are computed, in sweep order, as its plan says.

Owns the ring, the reader, the slots on the device and the copying thread. `sweep` sees three calls: `acquire` the next
piece, `release` it, `rewind` after a failure. On a CPU pieces are bound where they lie, in the RAM tier or in the
ring; on a device resident pieces never move, and the others pass through slots, copied on a lane of their own.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from lamella_engine.disk_reader import ALL_TOKENS, DiskReader, FilledChunk
from lamella_engine.errors import EngineError
from lamella_engine.expert_fetch import ExpertFetch
from lamella_engine.file_reads import STALL_S
from lamella_engine.pieces import PlacedPiece
from lamella_engine.placement import Tier
from lamella_engine.timeline import Lane, Timeline
from lamella_engine.transfer import DeviceSlot, Transfer

_POLL_S = 0.2

Item = TypeVar("Item")


class BoundSlot(NamedTuple):
    """A piece's bytes where they are computed: `tensor` is uint8, `key` names the buffer for caches of views.

    `is_converted` says that the tensors in it have been brought to the compute dtype already, `is_sparse` that its
    experts are still to come, or to be expanded.
    """

    key: tuple[str, int]
    tensor: torch.Tensor
    is_converted: bool = False
    is_sparse: bool = False


class Homes(NamedTuple):
    """What need not be read again, by number of its piece: buffers to compute from, and host memory to copy from.

    Of the resident pieces `unexpanded` experts are expanded when tokens are routed to them, as if they came then.
    """

    resident: Mapping[int, BoundSlot]
    in_ram: Mapping[int, torch.Tensor]
    unexpanded: frozenset[int] = frozenset()


class WeightStream(Protocol):
    """What the sweep needs: the next piece's bytes, in order."""

    def acquire(self, number: int) -> BoundSlot:
        """The bytes of piece `number`, which must be the next one in sweep order, until `release`."""

    def fetches(self, number: int) -> bool:
        """Whether piece `number` may come without its experts, or with experts to expand: they have to be fetched."""

    def fetch(self, number: int, experts: Sequence[int]) -> Sequence[int]:
        """Bring what is missing of `experts` to the acquired piece `number`, before anything computed from here on.

        Returns:
            Those of `experts` that were not there before.
        """

    def expect(self, tokens: int) -> None:
        """Say how many tokens the next sweeps carry, which decides what comes without its experts."""

    def release(self, number: int) -> None:
        """Give the acquired piece's buffer back."""

    def end_sweep(self) -> None:
        """Tell the timeline of the last whole sweep, whose results have been seen."""

    def rewind(self) -> None:
        """Begin again at piece 0, whatever was acquired or on its way."""

    def close(self) -> None:
        """Stop threads, close files; idempotent."""


class HostStream:
    """CPU: pieces of the RAM tier are bound where they are, the others in the ring they are read into."""

    def __init__(
        self,
        placed: Sequence[PlacedPiece],
        resident: Mapping[int, BoundSlot],
        reader: DiskReader | None,
        experts: ExpertFetch,
        timeline: Timeline,
    ) -> None:
        self._placed = tuple(placed)
        self._resident = dict(resident)
        self._reader = reader
        self._experts = experts
        self._timeline = timeline
        self._on_disk = [number for number, place in enumerate(placed) if place.tier is Tier.DISK]
        self._held: FilledChunk | None = None
        self._began_s = 0.0
        if reader is not None:
            reader.start()

    def acquire(self, number: int) -> BoundSlot:
        """See `WeightStream`."""
        slot = self._resident.get(number)
        if slot is None:
            assert self._reader is not None, "pieces on disk have a reader"
            self._held = self._reader.next_filled()
            _check_order(self._placed, self._on_disk[self._held.piece], number)
            key = "ring", self._held.tensor.data_ptr()
            slot = BoundSlot(key, self._held.tensor, is_sparse=self._held.is_sparse)
            if self._held.is_sparse:
                self._experts.begin(number)
        self._began_s = time.perf_counter()
        return slot

    def fetches(self, number: int) -> bool:
        """See `WeightStream`."""
        return number not in self._resident and self._placed[number].piece.experts is not None

    def fetch(self, number: int, experts: Sequence[int]) -> Sequence[int]:
        """See `WeightStream`."""
        if self._held is None or self._reader is None or not self._held.is_sparse:
            return ()
        piece = self._held.tensor
        visit = self._experts.bring(number, experts, piece)
        if visit.missing:
            self._reader.fill(self._held, self._experts.ranges(number, visit.missing))
            self._experts.keep(number, piece)
        return visit.first

    def expect(self, tokens: int) -> None:
        """See `WeightStream`."""
        if self._reader is not None:
            self._reader.expect(tokens)

    def release(self, number: int) -> None:
        """See `WeightStream`."""
        self._timeline.add(Lane.COMPUTE, self._placed[number].piece.name, self._began_s, time.perf_counter())
        if self._held is not None and self._reader is not None:
            self._reader.give_back(self._held)
            self._held = None

    def end_sweep(self) -> None:
        """See `WeightStream`; a CPU has told everything when the layers ran."""

    def rewind(self) -> None:
        """See `WeightStream`."""
        self._held = None
        if self._reader is not None:
            self._reader.stop()
            self._reader.start()

    def close(self) -> None:
        """See `WeightStream`."""
        if self._reader is not None:
            self._reader.close()
        self._resident.clear()
        self._experts.close()


class DeviceStream:
    """A device: a thread copies the pieces that are not resident to the next free slot, ahead of the sweep.

    Args:
        placed: all pieces in sweep order.
        homes: of those that stay on the device, and of those in the RAM tier.
        reader: of those on disk, in chunks that need not be whole pieces; None if there are none.
        slots: what streamed pieces pass through; at most as many as there are such pieces.
        transfer: how bytes reach the device.
        experts: those of the piece at hand, and those kept near.
        timeline: told of copies and computing.
    """

    def __init__(
        self,
        placed: Sequence[PlacedPiece],
        homes: Homes,
        reader: DiskReader | None,
        slots: Sequence[DeviceSlot],
        transfer: Transfer,
        experts: ExpertFetch,
        timeline: Timeline,
    ) -> None:
        self._placed = tuple(placed)
        self._resident = dict(homes.resident)
        self._in_ram = dict(homes.in_ram)
        self._unexpanded = homes.unexpanded
        self._expanded: set[int] = set()  # of the resident piece at hand
        self._reader = reader
        self._slots = tuple(slots)
        self._transfer = transfer
        self._experts = experts
        self._timeline = timeline
        self._streamed = [number for number, place in enumerate(placed) if place.tier is not Tier.VRAM]
        self._on_disk = [number for number, place in enumerate(placed) if place.tier is Tier.DISK]
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._held: DeviceSlot | None = None
        self._tokens = ALL_TOKENS
        self._has_swept = False
        self._is_closed = False
        self._start()

    def acquire(self, number: int) -> BoundSlot:
        """See `WeightStream`; the device waits for the copy, the caller only for its being ordered."""
        bound = self._resident.get(number)
        if bound is None:
            try:
                item = self._ready.get(timeout=STALL_S)
            except queue.Empty:
                raise EngineError(f"no layer reached the device within {STALL_S:.0f} s") from None
            if isinstance(item, BaseException):
                raise item
            arrived, self._held = item
            _check_order(self._placed, arrived, number)
            self._transfer.await_piece(number, self._held)
            bound = BoundSlot(("slot", self._held.key), self._held.tensor, is_sparse=self._held.is_sparse)
            if self._held.is_sparse:
                self._experts.begin(number)
        elif number in self._unexpanded:
            own = self._placed[number].piece.experts
            bound = bound._replace(is_sparse=own is not None and own.is_sparse(self._tokens))
            self._expanded.clear()
        self._transfer.begin_compute(number)
        return bound

    def fetches(self, number: int) -> bool:
        """See `WeightStream`."""
        is_moved = number not in self._resident
        return (is_moved or number in self._unexpanded) and self._placed[number].piece.experts is not None

    def fetch(self, number: int, experts: Sequence[int]) -> Sequence[int]:
        """See `WeightStream`."""
        if number in self._resident:
            first = sorted(set(experts) - self._expanded)
            self._expanded.update(first)
            return first
        if self._held is None or not self._held.is_sparse:
            return ()
        slot = self._held.tensor
        visit = self._experts.bring(number, experts, slot)
        ranges = self._experts.ranges(number, visit.missing)
        source = self._in_ram.get(number)
        if source is not None:
            for offset, nbytes in ranges:
                self._transfer.copy_now(slot[offset : offset + nbytes], source[offset : offset + nbytes])
        elif ranges:
            assert self._reader is not None, "pieces on disk have a reader"
            for chunk in self._reader.fetch(self._on_disk.index(number), ranges):
                self._transfer.copy_now(slot[chunk.offset : chunk.offset + chunk.nbytes], chunk.tensor)
                self._reader.give_back(chunk, self._transfer.when_used())
        if visit.missing:
            self._experts.keep(number, slot)
        return visit.first

    def expect(self, tokens: int) -> None:
        """See `WeightStream`."""
        self._tokens = tokens
        if self._reader is not None:
            self._reader.expect(tokens)

    def release(self, number: int) -> None:
        """See `WeightStream`."""
        self._transfer.end_compute(number)
        if self._held is not None:
            slot, self._held = self._held, None
            self._free.put_nowait(slot)
        self._has_swept = self._has_swept or number == len(self._placed) - 1

    def end_sweep(self) -> None:
        """See `WeightStream`."""
        if self._has_swept:
            self._transfer.end_sweep(self._timeline)

    def rewind(self) -> None:
        """See `WeightStream`."""
        self._halt()
        self._start()

    def close(self) -> None:
        """See `WeightStream`."""
        if self._is_closed:
            return
        self._halt()
        self._is_closed = True
        self._transfer.close()
        if self._reader is not None:
            self._reader.close()
        self._resident.clear()  # memory goes back even while somebody holds the stream
        self._in_ram.clear()
        self._experts.close()
        self._slots, self._held = (), None
        for waiting in (self._free, self._ready):
            _drain(waiting)

    def _start(self) -> None:
        self._stop.clear()
        self._held = None
        self._has_swept = False
        self._free: queue.Queue[DeviceSlot] = queue.Queue(maxsize=len(self._slots))
        self._ready: queue.Queue[tuple[int, DeviceSlot] | BaseException] = queue.Queue(maxsize=len(self._slots) + 1)
        if not self._streamed:
            return
        for slot in self._slots:
            slot.piece = None
            self._free.put_nowait(slot)
        if self._reader is not None:
            self._reader.start()
        self._thread = threading.Thread(target=self._run, name="lamella-copier", daemon=True)
        self._thread.start()

    def _halt(self) -> None:
        self._stop.set()
        if self._reader is not None:
            self._reader.stop()  # a copier that waits for bytes is woken by it
        if self._thread is not None:
            self._thread.join(timeout=STALL_S)
            if self._thread.is_alive():
                raise EngineError(f"the copier did not stop within {STALL_S:.0f} s")
            self._thread = None
        self._transfer.restart()

    def _run(self) -> None:
        try:
            self._transfer.attach_thread()
            while not self._stop.is_set():
                for number in self._streamed:
                    slot = take_until_stopped(self._free, self._stop)
                    if slot is None:
                        return
                    self._fill(number, slot)
                    self._ready.put_nowait((number, slot))
        except Exception as error:  # noqa: BLE001 - raised again by the sweep that waits
            self._ready.put_nowait(error)

    def _fill(self, number: int, slot: DeviceSlot) -> None:
        piece = self._placed[number].piece
        self._transfer.begin_piece(number, slot)
        source = self._in_ram.get(number)
        if source is not None:
            slot.is_sparse = piece.experts is not None and piece.experts.is_sparse(self._tokens)
            for offset, nbytes in piece.ranges(is_sparse=slot.is_sparse):
                self._transfer.copy(slot.tensor[offset : offset + nbytes], source[offset : offset + nbytes])
        else:
            self._fill_from_disk(slot)
        self._transfer.end_piece(number, slot)

    def _fill_from_disk(self, slot: DeviceSlot) -> None:
        assert self._reader is not None, "pieces on disk have a reader"
        is_last = False
        while not is_last:
            chunk = self._reader.next_filled()
            slot.is_sparse, is_last = chunk.is_sparse, chunk.is_last
            self._transfer.copy(slot.tensor[chunk.offset : chunk.offset + chunk.nbytes], chunk.tensor)
            self._reader.give_back(chunk, self._transfer.when_copied())


def take_until_stopped(waiting: queue.Queue[Item], stop: threading.Event) -> Item | None:
    """The next of `waiting`, however long it takes to come; None once `stop` is set."""
    while not stop.is_set():
        try:
            return waiting.get(timeout=_POLL_S)
        except queue.Empty:
            continue
    return None


def _drain(waiting: queue.Queue[Any]) -> None:
    """Drop whatever is in `waiting`."""
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.get_nowait()


def _check_order(placed: Sequence[PlacedPiece], arrived: int, wanted: int) -> None:
    if arrived != wanted:
        raise EngineError(
            f"{placed[wanted].piece.name} was called while {placed[arrived].piece.name} is next: this model does not "
            "call each layer once, in order, which streaming relies on"
        )
