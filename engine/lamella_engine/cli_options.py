"""What the engine's commands have in common: options, exit codes, how errors are told, and columns.

A command ends with 0 for done, 1 for what cannot be had or is broken, 2 for a wrong call. What is asked for goes to
standard output, progress and errors to standard error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lamella_engine.device import resolve_device
from lamella_engine.errors import EngineError, OptionError, PlanError
from lamella_engine.options import DTYPES
from lamella_engine.peer_address import Peers
from lamella_engine.shard_store import NO_PEERS, ShardStore, default_store_root

EXIT_FAILED = 1
EXIT_WRONG_CALL = 2


def _check_dtype(value: str | None) -> str | None:
    if value is not None and value not in DTYPES:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(DTYPES)}")
    return value


ExpertCacheOption = Annotated[
    str, typer.Option("--expert-cache", help='Memory for layers that often visited experts get: "50%", auto.')
]
StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Directory of the shard cache; else LAMELLA_STORE, else ~/.cache/lamella/shards."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help=f"Store weights as {', '.join(DTYPES)}; else as they are.", callback=_check_dtype),
]
DeleteOption = Annotated[
    bool,
    typer.Option(
        "--delete-original",
        help="Then check every shard and delete the weights they were built from; never if that would lose anything.",
    ),
]
QuantOption = Annotated[
    str | None,
    typer.Option(
        "--quant", help="Pack weights: nf4, fp4, int8, lossless, or such as int8,layers.0-3=bf16,lm_head=int8."
    ),
]
QuantTargetOption = Annotated[
    str | None,
    typer.Option(
        "--quant-target-bytes", help='Pack weights with the least error so that all take at most this: "4GiB".'
    ),
]
QuantDeviceOption = Annotated[str, typer.Option("--quant-device", help="What packs: cpu, cuda:N or auto.")]
InPlaceOption = Annotated[
    bool,
    typer.Option(
        "--in-place", help="Read layers from the original's files, without a second copy, where they lie as needed."
    ),
]
FromOption = Annotated[
    list[str] | None,
    typer.Option("--from", help="A peer that shares its store, http://HOST:PORT, asked before the hub; repeatable."),
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never ask the hub.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")]
StoredName = Annotated[str, typer.Argument(help="The model's name in the store, as `list` shows it.")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """One line instead of a stack trace for what can go wrong with models and files."""
    try:
        yield
    except EngineError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from error
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        typer.echo(f"error: cannot use{place}: {error.strerror or error}", err=True)
        raise typer.Exit(EXIT_FAILED) from error


@contextmanager
def wrong_calls() -> Iterator[None]:
    """An option that cannot work ends as a wrong call does; a plan that does not fit is no such thing."""
    try:
        yield
    except PlanError:
        raise
    except OptionError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_WRONG_CALL) from error


def device_budget(vram: str | None, device: str) -> str:
    """What `--vram` asks for on a device.

    Raises:
        OptionError: the device has no memory of its own.
    """
    if vram is not None and resolve_device(device).type == "cpu":
        raise OptionError(f"--vram is {vram!r}, but a CPU has no device memory; use --ram, or --device cuda")
    return vram or "auto"


def open_store(root: Path | None, peers: Peers = NO_PEERS) -> ShardStore:
    """The store at `root`, else the usual one."""
    return ShardStore(root or default_store_root(), peers=peers)


def print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of equal length, each column as wide as it has to be."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())
