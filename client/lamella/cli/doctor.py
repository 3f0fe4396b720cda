"""`lamella doctor`: look at everything a service needs, and say what to do about what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli import options
from lamella.cli.check_gpu import check_gpus
from lamella.cli.check_host import check_disk, check_memory, default_store
from lamella.cli.check_server import check_server
from lamella.cli.finding import Finding, Level

MIB = 1024 * 1024


def doctor(
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
    store: options.Store = None,
    disk_mib: Annotated[int, typer.Option("--disk-mib", min=4, max=16384, help="Size of the disk test's file.")] = 256,
) -> None:
    """Check the server, the disk, memory, GPUs and torch; exit code 1 if something is broken."""
    place = Path(store).expanduser() if store else default_store()
    is_broken = False
    for findings in (
        check_server(redis_url, prefix),
        check_disk(place, disk_mib * MIB),
        check_memory(),
        check_gpus(),
    ):
        for finding in findings:
            _echo(finding)
            is_broken = is_broken or finding.level is Level.BROKEN
    if is_broken:
        raise typer.Exit(1)


def _echo(finding: Finding) -> None:
    typer.echo(f"{finding.level.value:<7} {finding.what}")
    if finding.fix:
        typer.echo(f"{'':<7} -> {finding.fix}")
