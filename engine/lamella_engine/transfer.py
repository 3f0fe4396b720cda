"""Moving bytes to a device while it computes: the interface the weight stream uses, and its form for CUDA.

A transfer owns the copy stream and everything that orders copies and computing; it allocates nothing and waits for
nothing in a steady sweep. Another form, with a bus of chosen speed in host memory, tests the stream without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from lamella_engine.timeline import Lane, Timeline

CLOCK_S = 60.0  # events count in float32 milliseconds: their clock starts anew before that gets coarse


class DeviceSlot:
    """A buffer on the device that pieces take turns in; `key` tells it from the others."""

    def __init__(self, key: int, tensor: torch.Tensor) -> None:
        self.key = key
        self.tensor = tensor
        self.piece: int | None = None  # what it holds, or held last
        self.is_sparse = False  # it came without its experts
        self.round = 0  # of which sweep


class Transfer(Protocol):
    """Copies in order on one lane, and computing on another.

    `begin_piece`, `copy`, `when_copied` and `end_piece` belong to the copying thread; `await_piece`, `begin_compute`,
    `copy_now`, `when_used`, `copy_aside`, `end_compute` and `end_sweep` to the sweep thread. Pieces are numbered in
    sweep order.
    """

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8 [nbytes]."""

    def attach_thread(self) -> None:
        """Make the calling thread one that may copy."""

    def begin_piece(self, number: int, slot: DeviceSlot) -> None:
        """Let following copies start once the piece computed last in `slot` is done with it."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy host bytes to device memory; returns at once."""

    def when_copied(self) -> Callable[[], None]:
        """Something to call that returns once all copies so far have ended."""

    def copy_now(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy host bytes to device memory before anything that is computed from here on; returns at once."""

    def when_used(self) -> Callable[[], None]:
        """Something to call that returns once all of `copy_now` so far has ended."""

    def copy_aside(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy within the device, or from it to the host, in order with computing and `copy_now`; returns at once."""

    def end_piece(self, number: int, slot: DeviceSlot) -> None:
        """The copies of the piece are complete with those made so far."""

    def await_piece(self, number: int, slot: DeviceSlot) -> None:
        """Let computing wait for the copies of the piece."""

    def begin_compute(self, number: int) -> None:
        """The layer of the piece is about to be computed."""

    def end_compute(self, number: int) -> None:
        """The layer of the piece has been given to the device."""

    def end_sweep(self, timeline: Timeline) -> None:
        """Tell the times of the last whole sweep, once it has ended; the next has not begun to compute."""

    def restart(self) -> None:
        """Wait for everything under way, and begin again at piece 0."""

    def close(self) -> None:
        """Give back what copying took; idempotent."""


class _PieceEvents:
    """When a piece was copied and computed in one sweep."""

    def __init__(self) -> None:
        self.copy_begin, self.copy_end, self.compute_begin, self.compute_end = (_event() for _ in range(4))


class CudaTransfer:
    """Copies on a stream of its own, ordered against the current stream by events.

    Two sets of events take turns, because copies for the next sweep begin while this one computes.
    """

    def __init__(self, device: torch.device, names: Iterable[str]) -> None:
        self._device = device
        self._names = tuple(names)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch leaves it without types
        self._events = [[_PieceEvents() for _ in self._names] for _ in range(2)]
        self._origin = _event()
        self._is_copied = [False] * len(self._names)
        self._copy_round = [0] * len(self._names)
        self._sweep = 0
        self._restart_clock()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """See `Transfer`."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        # It may have been another tensor's, whose last kernel is still to run.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return memory

    def attach_thread(self) -> None:
        """See `Transfer`."""
        torch.cuda.set_device(self._device)

    def begin_piece(self, number: int, slot: DeviceSlot) -> None:
        """See `Transfer`."""
        # A slot is free again only once its piece was given to the device, so the event is that of its last use.
        if slot.piece is not None:
            self._stream.wait_event(self._events[slot.round % 2][slot.piece].compute_end)
        self._copy_events(number).copy_begin.record(self._stream)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Transfer`."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def when_copied(self) -> Callable[[], None]:
        """See `Transfer`."""
        event = _event(is_blocking=True)
        event.record(self._stream)
        return event.synchronize

    def copy_now(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Transfer`; on the computing stream, so that it does not wait for what is copied ahead."""
        target.copy_(source, non_blocking=True)

    def when_used(self) -> Callable[[], None]:
        """See `Transfer`."""
        event = _event(is_blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize

    def copy_aside(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Transfer`."""
        target.copy_(source, non_blocking=True)

    def end_piece(self, number: int, slot: DeviceSlot) -> None:
        """See `Transfer`."""
        self._copy_events(number).copy_end.record(self._stream)
        slot.piece, slot.round = number, self._copy_round[number]
        self._copy_round[number] += 1
        self._is_copied[number] = True

    def await_piece(self, number: int, slot: DeviceSlot) -> None:
        """See `Transfer`."""
        torch.cuda.current_stream(self._device).wait_event(self._events[self._sweep % 2][number].copy_end)

    def begin_compute(self, number: int) -> None:
        """See `Transfer`."""
        self._events[self._sweep % 2][number].compute_begin.record(torch.cuda.current_stream(self._device))

    def end_compute(self, number: int) -> None:
        """See `Transfer`."""
        self._events[self._sweep % 2][number].compute_end.record(torch.cuda.current_stream(self._device))
        if number == len(self._names) - 1:
            self._sweep += 1

    def end_sweep(self, timeline: Timeline) -> None:
        """See `Transfer`."""
        last = self._events[(self._sweep - 1) % 2]
        # A sweep that only read prompts gave its caller nothing to wait for, and events under way tell no times.
        last[-1].compute_end.synchronize()
        for number, events in enumerate(last):
            name = self._names[number]
            if self._is_copied[number]:
                self._tell(timeline, Lane.COPY, name, events.copy_begin, events.copy_end)
            self._tell(timeline, Lane.COMPUTE, name, events.compute_begin, events.compute_end)
        if time.perf_counter() - self._origin_s > CLOCK_S:
            self._restart_clock()

    def restart(self) -> None:
        """See `Transfer`."""
        torch.cuda.synchronize(self._device)
        self._is_copied = [False] * len(self._names)
        self._copy_round = [0] * len(self._names)
        self._sweep = 0
        self._restart_clock()

    def close(self) -> None:
        """See `Transfer`."""
        torch.cuda.synchronize(self._device)

    def _copy_events(self, number: int) -> _PieceEvents:
        return self._events[self._copy_round[number] % 2][number]

    def _restart_clock(self) -> None:
        self._origin.record(torch.cuda.current_stream(self._device))
        self._origin.synchronize()
        self._origin_s = time.perf_counter()

    def _tell(self, timeline: Timeline, lane: Lane, name: str, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        low = self._origin_s + self._origin.elapsed_time(begin) / 1e3
        timeline.add(lane, name, low, low + begin.elapsed_time(end) / 1e3)


def _event(*, is_blocking: bool = False) -> torch.cuda.Event:
    """An event that tells times, or one that a thread waits for without spinning."""
    return torch.cuda.Event(enable_timing=not is_blocking, blocking=is_blocking)  # type: ignore[no-untyped-call] # torch's
