"""How things look on the terminal: columns, sizes, ages, JSON, the figures of a finished job."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence

import typer
from pydantic import BaseModel

from lamella.messages import Usage, WorkerInfo


def echo_json(value: BaseModel | Sequence[BaseModel | Mapping[str, object]] | dict[str, object]) -> None:
    """Print a message or a mapping, or a list of them, as JSON."""
    if isinstance(value, BaseModel):
        plain: object = value.model_dump(mode="json")
    elif isinstance(value, dict):
        plain = value
    else:
        plain = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value]
    typer.echo(json.dumps(plain, indent=2))


def echo_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns as wide as their widest cell."""
    table = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_text(text: str) -> None:
    """Write a piece of an answer to stdout at once; on a terminal without the characters that steer it."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """Return `text` without control characters other than newline and tab, so that it cannot steer a terminal."""
    return "".join(char for char in text if char in "\n\t" or not (ord(char) < 32 or 127 <= ord(char) < 160))


def size(num_bytes: float) -> str:
    """Return a size in decimal units, such as ``98.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def age(since: float) -> str:
    """Return how long ago a Unix time was, such as ``3m``."""
    seconds = max(0, int(time.time() - since))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def ahead(until: float) -> str:
    """Return how far ahead a Unix time is, such as ``in 3m``."""
    seconds = until - time.time()
    return "now" if seconds < 1 else f"in {age(time.time() - seconds)}"


def figures(usage: Usage, worker: WorkerInfo | None) -> str:
    """Return one line of a finished job's figures; the memory is left out when its worker is gone."""
    tokens = usage.completion_tokens
    parts = [f"{tokens} tokens", f"{usage.run_s:.2f} s"]
    if usage.run_s > 0:
        parts.append(f"{tokens / usage.run_s:.2f} tokens/s")
    parts.append(f"{usage.sweeps} sweeps")
    if tokens:
        parts.append(f"{size(usage.streamed_bytes / tokens)} streamed per token")
    if worker is not None:
        parts.append(f"peak memory of the worker {size(worker.peak_rss_bytes)}")
    return ", ".join(parts)
