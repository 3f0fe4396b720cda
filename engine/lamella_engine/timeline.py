"""What moved and how long it took: totals for the counters, and on request every interval for a trace.

Filled by the reader threads, the copying thread and the sweep thread; read by anyone. Times are seconds of
`time.perf_counter`. The trace is the JSON array format that Chrome's ``about:tracing`` and Perfetto open.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

MAX_INTERVALS = 200_000  # kept for a trace; the oldest go first


class Lane(StrEnum):
    """What may run at the same time as the others."""

    READ = "read"
    COPY = "copy"
    COMPUTE = "compute"
    SWEEP = "sweep"


class Interval(NamedTuple):
    """Something that took from `begin_s` to `end_s`."""

    lane: Lane
    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class StreamTotals:
    """Totals since the engine opened.

    Attributes:
        disk_bytes, ram_bytes, vram_bytes: weight bytes that sweeps used from each tier.
        read_s: seconds in which at least one read was under way.
        copy_s: seconds of copies to the device.
        compute_s: seconds in which layers computed on the device (on a CPU: in the layers' own code).
        sweep_s: seconds of all sweeps, from packing to chosen tokens.
        experts_visited: experts wanted from layers that had come without them; one for each layer, sweep and expert.
        experts_in_vram, experts_in_ram: those of them that were kept there from earlier sweeps.
    """

    disk_bytes: int = 0
    ram_bytes: int = 0
    vram_bytes: int = 0
    read_s: float = 0.0
    copy_s: float = 0.0
    compute_s: float = 0.0
    sweep_s: float = 0.0
    experts_visited: int = 0
    experts_in_vram: int = 0
    experts_in_ram: int = 0

    @property
    def bubble_s(self) -> float:
        """Seconds of sweeps in which no layer computed: waiting for weights, or for the host."""
        return max(0.0, self.sweep_s - self.compute_s)


class Timeline:
    """Collects totals, and intervals if `is_tracing`; every method may be called from any thread."""

    def __init__(self, *, is_tracing: bool = False) -> None:
        self.is_tracing = is_tracing
        self._lock = threading.Lock()
        self._intervals: deque[Interval] = deque(maxlen=MAX_INTERVALS)
        self._disk_bytes = self._ram_bytes = self._vram_bytes = 0
        self._read_s = self._copy_s = self._compute_s = self._sweep_s = 0.0
        self._experts = (0, 0, 0)

    def add(self, lane: Lane, name: str, begin_s: float, end_s: float) -> None:
        """Tell of an interval; reads that overlap are added up by `add_read_s` instead."""
        with self._lock:
            if lane is Lane.COPY:
                self._copy_s += end_s - begin_s
            elif lane is Lane.COMPUTE:
                self._compute_s += end_s - begin_s
            elif lane is Lane.SWEEP:
                self._sweep_s += end_s - begin_s
            if self.is_tracing:
                self._intervals.append(Interval(lane, name, begin_s, end_s))

    def add_read_s(self, seconds: float) -> None:
        """Tell that the disk was read for so long, by however many threads."""
        with self._lock:
            self._read_s += seconds

    def add_sweep_bytes(self, disk_bytes: int, ram_bytes: int, vram_bytes: int) -> None:
        """Tell what one sweep used."""
        with self._lock:
            self._disk_bytes += disk_bytes
            self._ram_bytes += ram_bytes
            self._vram_bytes += vram_bytes

    def add_experts(self, visited: int, in_vram: int, in_ram: int) -> None:
        """Tell how many experts a layer wanted, and how many of them were kept near."""
        with self._lock:
            before = self._experts
            self._experts = before[0] + visited, before[1] + in_vram, before[2] + in_ram

    def totals(self) -> StreamTotals:
        """Everything so far."""
        with self._lock:
            return StreamTotals(
                self._disk_bytes, self._ram_bytes, self._vram_bytes,
                self._read_s, self._copy_s, self._compute_s, self._sweep_s, *self._experts,
            )  # fmt: skip

    def intervals(self) -> tuple[Interval, ...]:
        """The intervals kept, in the order in which they ended."""
        with self._lock:
            return tuple(self._intervals)

    def write_trace(self, path: Path) -> None:
        """Write the intervals kept as a Chrome trace."""
        lanes = list(Lane)
        events: list[dict[str, object]] = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": lane.value}}
            for number, lane in enumerate(lanes)
        ]
        events += [
            {
                "name": interval.name,
                "ph": "X",
                "pid": 1,
                "tid": lanes.index(interval.lane),
                "ts": interval.begin_s * 1e6,
                "dur": (interval.end_s - interval.begin_s) * 1e6,
            }
            for interval in self.intervals()
        ]
        path.write_text(json.dumps(events), encoding="utf-8")
