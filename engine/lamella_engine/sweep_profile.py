"""What a sweep moved from each tier and what its time went to, and the table that shows it.

Owns the arithmetic from the engine's totals to figures a sweep. `bench` measures with it, `auto_model` prints it after
each call; the totals come from `timeline`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from lamella_engine.byte_size import byte_size
from lamella_engine.sequence_types import EngineCounters

_PLAIN_WIDTH = 120  # columns where nobody says how wide the output may be


@dataclass(frozen=True)
class SweepProfile:
    """One sweep on average.

    A GPU tells the seconds of its copies and layers when the next sweep begins, so those of the last sweep count for
    what comes after it: of a few sweeps they are only nearly right.

    Attributes:
        sweeps: how many it is the average of.
        disk_bytes, ram_bytes, vram_bytes: weight bytes used from each tier.
        read_s: seconds in which the disk was read.
        copy_s: seconds of copies to the device.
        compute_s: seconds in which layers computed.
        bubble_s: seconds in which no layer computed.
        expand_s: seconds of `compute_s` in which packed weights were expanded, where that was measured.
        experts_visited: experts wanted of layers that had come without them.
        experts_kept: those of them that were near from earlier sweeps, on the device or in RAM.
    """

    sweeps: int
    disk_bytes: int
    ram_bytes: int
    vram_bytes: int
    read_s: float
    copy_s: float
    compute_s: float
    bubble_s: float
    experts_visited: float = 0.0
    experts_kept: float = 0.0
    expand_s: float = 0.0

    @classmethod
    def between(cls, before: EngineCounters, after: EngineCounters) -> SweepProfile:
        """The average of the sweeps that the engine ran from `before` to `after`; all zero if there was none."""
        sweeps = after.sweeps - before.sweeps
        each = max(1, sweeps)
        compute_s = after.compute_s - before.compute_s
        return cls(
            sweeps=sweeps,
            disk_bytes=(after.disk_bytes - before.disk_bytes) // each,
            ram_bytes=(after.ram_bytes - before.ram_bytes) // each,
            vram_bytes=(after.vram_bytes - before.vram_bytes) // each,
            read_s=(after.read_s - before.read_s) / each,
            copy_s=(after.copy_s - before.copy_s) / each,
            compute_s=compute_s / each,
            bubble_s=max(0.0, after.sweep_s - before.sweep_s - compute_s) / each,
            experts_visited=(after.experts_visited - before.experts_visited) / each,
            experts_kept=(_kept(after) - _kept(before)) / each,
        )


def _kept(counters: EngineCounters) -> int:
    return counters.experts_in_vram + counters.experts_in_ram


def profile_table(rows: Iterable[tuple[int, SweepProfile]], title: str) -> Table:
    """A row for each number of sequences and its profile; experts and expanding have a column where there were any."""
    rows = list(rows)
    has_experts = any(profile.experts_visited for _, profile in rows)
    has_expanding = any(profile.expand_s for _, profile in rows)
    table = Table(
        "sequences", "sweeps", "from disk", "from RAM", "from VRAM", "read s", "copy s", "compute s", "bubble s",
        *(["expanding s"] if has_expanding else []), *(["experts (kept)"] if has_experts else []),
        title=title, title_justify="left",
    )  # fmt: skip
    for column in table.columns:
        column.justify = "right"
    for count, profile in rows:
        sizes = (profile.disk_bytes, profile.ram_bytes, profile.vram_bytes)
        seconds = (profile.read_s, profile.copy_s, profile.compute_s, profile.bubble_s)
        table.add_row(
            str(count),
            str(profile.sweeps),
            *(byte_size(nbytes) if nbytes else "-" for nbytes in sizes),
            *(f"{second:.4f}" if second else "-" for second in seconds),
            *([f"{profile.expand_s:.4f}"] if has_expanding else []),
            *([_experts(profile)] if has_experts else []),
        )
    return table


def plain_console() -> Console:
    """Standard output, wide enough for a table also where it is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PLAIN_WIDTH)
    return console


def _experts(profile: SweepProfile) -> str:
    visited = profile.experts_visited
    return f"{visited:.0f} ({profile.experts_kept / visited:.0%})" if visited else "-"
