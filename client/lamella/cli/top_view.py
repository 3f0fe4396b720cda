"""Draws what `lamella top` shows: three tables that fit a terminal of 80 columns; does no I/O.

Neighbours: `top_data` (the figures), `top` (the screen).
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lamella.cli.output import printable, size
from lamella.cli.top_data import Frame, JobRow
from lamella.map_bar import duration

NONE = "-"
_COLOURS = {"busy": "green", "idle": "dim", "queued": "yellow", "running": "green", "failed": "red", "done": "dim"}


def draw(frame: Frame, height: int | None = None, *, keys: str = "") -> RenderableType:
    """Return a frame for the screen; with a `height` as many jobs as it has lines for."""
    parts: list[RenderableType] = [_headline(frame, keys)]
    if frame.error is not None:
        parts.append(Text(f"{frame.error} Trying again; below is the last that was heard.", style="bold red"))
    parts += [_workers(frame), Text(), _queues(frame), Text()]
    used = 7 + len(frame.workers) + len(frame.queues) + (3 if frame.error else 0)
    room = len(frame.jobs) if height is None else max(0, height - used)
    if room > 0:
        parts.append(_jobs(frame.jobs[:room]))
    return Group(*parts)


def _headline(frame: Frame, keys: str) -> Text:
    running = sum(worker.running for worker in frame.workers)
    slots = sum(worker.slots for worker in frame.workers)
    waiting = sum(queue.waiting for queue in frame.queues)
    speed = sum(worker.tokens_per_s or 0.0 for worker in frame.workers)
    told = f"lamella  {len(frame.workers)} workers, {running} of {slots} slots, {waiting} waiting, {speed:.1f} tokens/s"
    return Text.assemble((told, "bold"), (f"  {keys}" if keys else "", "dim"), no_wrap=True, overflow="ellipsis")


def _table(*columns: tuple[str, bool, int]) -> Table:
    """Return a table; a column is its name, whether it is of figures, and its share of the room (0: as it needs)."""
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold reverse")
    for name, is_figure, ratio in columns:
        table.add_column(
            name, justify="right" if is_figure else "left", no_wrap=True, overflow="ellipsis", ratio=ratio or None
        )
    return table


def _workers(frame: Frame) -> Table:
    table = _table(
        ("WORKER", False, 4),
        ("DEVICE", False, 0),
        ("MODEL", False, 4),
        ("STATE", False, 0),
        ("RUN", True, 0),
        ("TOK/S", True, 0),
        ("SWEEP", True, 0),
        ("DISK/S", True, 0),
        ("RAM/S", True, 0),
        ("VRAM/S", True, 0),
    )
    for worker in frame.workers:
        table.add_row(
            _text(worker.name),
            _text(worker.device),
            _text(", ".join(worker.models)),
            _state(worker.state),
            f"{worker.running}/{worker.slots}",
            _figure(worker.tokens_per_s),
            _sweep(worker.sweep_s),
            _bytes(worker.disk_bytes_per_s),
            _bytes(worker.ram_bytes_per_s),
            _bytes(worker.vram_bytes_per_s),
        )
    return _or_none(table, 10, "no live worker; start one with `lamella worker --model NAME`")


def _queues(frame: Frame) -> Table:
    table = _table(
        ("QUEUE", False, 1),
        ("WORKERS", True, 0),
        ("WAITING", True, 0),
        ("IN FLIGHT", True, 0),
        ("OLDEST", True, 0),
        ("TOK/S", True, 0),
    )
    for queue in frame.queues:
        table.add_row(
            _text(queue.model),
            str(queue.workers),
            str(queue.waiting),
            f"{queue.in_flight}/{queue.slots}",
            NONE if queue.oldest_s is None else duration(queue.oldest_s),
            _figure(queue.tokens_per_s),
        )
    return _or_none(table, 6, "no model is served or waited for")


def _jobs(jobs: Sequence[JobRow]) -> Table:
    table = _table(
        ("JOB", False, 0),
        ("STATE", False, 0),
        ("MODEL", False, 3),
        ("USER", False, 2),
        ("EVENTS", True, 0),
        ("AGE", True, 0),
    )
    for job in jobs:
        cells = (job.job_id, _state(job.state), _text(job.model), _text(job.user or NONE))
        table.add_row(*cells, str(job.events), duration(job.age_s))
    return _or_none(table, 6, "no job yet")


def _or_none(table: Table, columns: int, why: str) -> Table:
    if table.row_count == 0:
        table.add_row(Text(why, style="dim", overflow="ellipsis"), *[""] * (columns - 1))
        for column in table.columns[1:]:
            column.ratio = None
    return table


def _text(text: str) -> Text:
    """Return a name as it is: neither the terminal nor the tables read anything into it."""
    return Text(printable(text))


def _state(state: str) -> Text:
    return Text(state, style=_COLOURS.get(state, "yellow"))


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _bytes(value: float | None) -> str:
    """Return bytes a second, short enough for a narrow column."""
    return NONE if value is None else size(value).replace(" ", "").replace("B", "")


def _sweep(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds * 1000:.0f}ms" if seconds < 1 else f"{seconds:.1f}s"
