"""`lamella doctor`: look at everything a service needs, and say what to do about what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lamella.cli import options
from lamella.cli.check_gpu import check_gpus
from lamella.cli.check_host import check_disk, check_memory, default_store
from lamella.cli.check_server import check_server
from lamella.cli.finding import Finding, Level
from lamella.cli.output import echo_json

MIB = 1024 * 1024


def doctor(
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
    store: options.Store = None,
    as_json: options.AsJson = False,
    disk_mib: Annotated[int, typer.Option("--disk-mib", min=4, max=16384, help="Size of the disk test's file.")] = 256,
) -> None:
    """Check the server, the disk, memory, GPUs and torch; exit code 1 if something is broken."""
    place = Path(store).expanduser() if store else default_store()
    checks: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("server", lambda: check_server(redis_url, prefix)),
        ("disk", lambda: check_disk(place, disk_mib * MIB)),
        ("memory", check_memory),
        ("GPUs and torch", check_gpus),
    )
    found: list[Finding] = []
    for name, check in checks:
        with _working(f"looking at the {name} ..."):
            findings = check()
        found += findings
        for finding in [] if as_json else findings:
            _echo(finding)
    if as_json:
        echo_json([{"level": each.level.value.lower(), "what": each.what, "fix": each.fix or None} for each in found])
    if any(finding.level is Level.BROKEN for finding in found):
        raise typer.Exit(1)


def _working(what: str) -> AbstractContextManager[object]:
    """Show on a terminal that a check goes on."""
    console = Console(stderr=True)
    return console.status(what) if console.is_terminal else nullcontext()


def _echo(finding: Finding) -> None:
    typer.echo(f"{finding.level.value:<7} {finding.what}")
    if finding.fix:
        typer.echo(f"{'':<7} -> {finding.fix}")
