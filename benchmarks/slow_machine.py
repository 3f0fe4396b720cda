"""A machine with a disk and a bus of chosen speed, out of this one: plans and overlap are tried without the hardware.

The engine's own reader, ring, slots and copying thread run; only the bytes are metered. "Device memory" is host memory,
and computing is this CPU's, so a model must be small enough that moving its bytes at the chosen speeds takes longer.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lamella_engine.file_reads import ReadStyle, ShardFile
from lamella_engine.open_model import Machine
from lamella_engine.placement import Bandwidths
from lamella_engine.timeline import Lane, Timeline
from lamella_engine.transfer import DeviceSlot

WAIT_S = 120.0
FAST_FLOPS = 1e15  # computing does not limit a virtual machine
FAST_MEMORY = 1e12
STYLE = ReadStyle(depth=2, block_bytes=256 * 1024, direct=False)
GIB = 2**30


@dataclass(frozen=True)
class OldMachine:
    """Some machine of a shelf, in the nominal figures of its parts.

    Attributes:
        disk, bus: what moves bytes, bytes a second.
        memory: bytes a second from the card's memory; `flops`: operations a second. They are for planning: computing
            is done by this CPU, whatever they say.
        vram: bytes of the card's memory.
    """

    name: str
    disk: float
    bus: float
    memory: float
    flops: float
    vram: int


MACHINES = (
    OldMachine("GTX 1070 + SATA", disk=0.53e9, bus=12e9, memory=256e9, flops=6.5e12, vram=8 * GIB),
    OldMachine("RTX 2060 + NVMe", disk=3.0e9, bus=12e9, memory=336e9, flops=26e12, vram=6 * GIB),
    OldMachine("GT 1030 (x4) + NVMe", disk=3.0e9, bus=3.2e9, memory=48e9, flops=1.1e12, vram=2 * GIB),
)


class Passage(NamedTuple):
    """When some bytes begin to pass a meter and when the last of them has passed."""

    begin_s: float
    end_s: float


class Meter:
    """Lets `rate` bytes a second pass, one portion after the other, from whatever threads.

    A portion begins when it is asked for or when the one before it has passed, whichever is later: as on a real lane,
    what waits in its queue goes on without a gap, even where the thread that asked for it wakes late.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._pause = threading.Event()

    def ask(self, nbytes: int, asked_s: float) -> Passage:
        """Take the lane for `nbytes` that somebody asked for at `asked_s`."""
        with self._lock:
            begin_s = max(asked_s, self._free_at)
            self._free_at = begin_s + nbytes / self.rate
            return Passage(begin_s, self._free_at)

    def wait(self, passage: Passage) -> None:
        """Return when the last byte of `passage` has passed."""
        self._pause.wait(max(0.0, passage.end_s - time.perf_counter()))


class MeteredFile(ShardFile):
    """A shard file on a disk of metered speed; the real one is read through the file cache."""

    def __init__(self, path: Path, meter: Meter) -> None:
        super().__init__(path, direct=False)
        self._meter = meter
        self._metered_path = path

    def read(self, view: memoryview, start: int, needed: int) -> None:
        """See `ShardFile.read`."""
        passage = self._meter.ask(needed, time.perf_counter())
        with self._metered_path.open("rb") as file:
            done = 0
            while done < needed:
                count = os.preadv(file.fileno(), [view[done:needed]], start + done)
                assert count > 0, f"{self._metered_path} is too short"
                done += count
        self._meter.wait(passage)


class MeteredTransfer:
    """A `Transfer` over a bus of metered speed; "device" and host compute at once, as a GPU and its host do."""

    def __init__(self, names: Sequence[str], meter: Meter) -> None:
        self._names = tuple(names)
        self._meter = meter
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=100_000)
        self._copied: dict[int, threading.Event] = {}
        self._copies: deque[Passage] = deque(maxlen=100_000)
        self._begun: dict[int, float] = {}
        self._compute_times: list[tuple[int, float, float]] = []
        self._thread = threading.Thread(target=self._run, name="lamella-metered-bus", daemon=True)
        self._thread.start()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """See `Transfer`."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def attach_thread(self) -> None:
        """See `Transfer`; any thread may copy."""

    def begin_piece(self, number: int, slot: DeviceSlot) -> None:
        """See `Transfer`; a CPU has computed by the time a slot is free."""
        self._copied[number] = threading.Event()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Transfer`."""
        asked_s = time.perf_counter()

        def move() -> None:
            passage = self._meter.ask(target.nbytes, asked_s)
            target.copy_(source)
            self._meter.wait(passage)
            self._copies.append(passage)

        self._work.put(move, timeout=WAIT_S)

    def when_copied(self) -> Callable[[], None]:
        """See `Transfer`."""
        event = threading.Event()
        self._work.put(event.set, timeout=WAIT_S)
        return lambda: _wait(event)

    def copy_now(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Transfer`; it takes its turn on the bus."""
        passage = self._meter.ask(target.nbytes, time.perf_counter())
        target.copy_(source)
        self._meter.wait(passage)
        self._copies.append(passage)

    def when_used(self) -> Callable[[], None]:
        """See `Transfer`; it has ended already."""
        return lambda: None

    def copy_aside(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Transfer`; nothing takes turns with it."""
        target.copy_(source)

    def end_piece(self, number: int, slot: DeviceSlot) -> None:
        """See `Transfer`."""
        self._work.put(self._copied[number].set, timeout=WAIT_S)
        slot.piece = number

    def await_piece(self, number: int, slot: DeviceSlot) -> None:
        """See `Transfer`."""
        _wait(self._copied[number])

    def begin_compute(self, number: int) -> None:
        """See `Transfer`."""
        self._begun[number] = time.perf_counter()

    def end_compute(self, number: int) -> None:
        """See `Transfer`."""
        self._compute_times.append((number, self._begun[number], time.perf_counter()))

    def end_sweep(self, timeline: Timeline) -> None:
        """See `Transfer`."""
        for number, begin_s, end_s in self._compute_times:
            timeline.add(Lane.COMPUTE, self._names[number], begin_s, end_s)
        self._compute_times.clear()
        while self._copies:
            passage = self._copies.popleft()
            timeline.add(Lane.COPY, "copy", passage.begin_s, passage.end_s)

    def restart(self) -> None:
        """See `Transfer`."""
        event = threading.Event()
        self._work.put(event.set, timeout=WAIT_S)
        _wait(event)
        self._compute_times.clear()

    def close(self) -> None:
        """See `Transfer`."""
        if self._thread.is_alive():
            self._work.put(None, timeout=WAIT_S)
            self._thread.join(WAIT_S)

    def _run(self) -> None:
        while (step := self._work.get()) is not None:
            step()


def slow_machine(old: OldMachine, scale: float, vram: int, ram: int, style: ReadStyle = STYLE) -> Machine:
    """A machine with the disk and bus of `old`, each slowed down by `scale`, and budgets in bytes."""
    disk, bus = Meter(old.disk / scale), Meter(old.bus / scale)
    return Machine(
        device=torch.device("cpu"),
        vram=vram,
        ram=ram,
        bandwidths=Bandwidths(disk.rate, bus.rate, FAST_MEMORY, FAST_FLOPS, frozenset({"disk", "h2d"})),
        style=style,
        open_file=lambda path: MeteredFile(path, disk),
        make_transfer=lambda names: MeteredTransfer(names, bus),
    )


def _wait(event: threading.Event) -> None:
    if not event.wait(WAIT_S):
        raise TimeoutError(f"nothing was copied within {WAIT_S:.0f} s")
