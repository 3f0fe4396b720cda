"""A progress bar for many jobs on stderr; rich is loaded only where a bar is asked for."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from lamella.map_meter import MapProgress, ProgressCall


@contextmanager
def shown_progress(progress: ProgressCall | bool) -> Generator[ProgressCall, None, None]:
    """Yield what is to be called with the progress: a given function, a bar for True, nothing for False."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, figures="")

        def show(now: MapProgress) -> None:
            bar.update(task, completed=now.done, total=now.total, figures=figures(now))

        yield show


def figures(now: MapProgress) -> str:
    """Return the figures beside the bar: speed, jobs under way, failures, what remains."""
    parts = [f"{now.tokens_per_s:.1f} tokens/s", f"{now.in_flight} in flight"]
    if now.failed:
        parts.append(f"{now.failed} failed")
    if now.remaining_s is not None and now.total != now.done:
        parts.append(f"{duration(now.remaining_s)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return a length of time, such as ``3m 20s``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
