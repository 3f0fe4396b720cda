"""``lamella plan MODEL``: where every part of a model would live within given budgets, and how fast it would run.

Owns options, exit codes and the check of the disk: 0 for a plan, 1 for a model that does not fit or cannot be had, 2
for a wrong call. `plan_target` finds out about the machine, `planner` plans, `plan_report` shows.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Annotated

import torch
import typer

from lamella_engine.budget import parse_budget, parse_share
from lamella_engine.byte_size import byte_size
from lamella_engine.cli_options import ExpertCacheOption, StoreOption, plain_errors, wrong_calls
from lamella_engine.compute_dtype import choose_dtype
from lamella_engine.errors import DiskFull, OptionError
from lamella_engine.estimate import predict
from lamella_engine.model_sizes import sizes_of_source
from lamella_engine.model_source import ModelSource, find_model, torch_dtype
from lamella_engine.options import DTYPES
from lamella_engine.placement import ModelSizes
from lamella_engine.plan_report import PlanReport
from lamella_engine.plan_target import Target, TargetOptions, bandwidths_of, find_target
from lamella_engine.planner import PlanRequest, make_plan
from lamella_engine.shard import DATA_ALIGNMENT, files_of
from lamella_engine.shard_store import ShardStore, default_store_root

SEQUENCES = (1, 8, 64)

app = typer.Typer(name="plan", pretty_exceptions_enable=False, add_completion=False)


@app.command()
def show_plan(  # noqa: PLR0913  a command has as many arguments as options
    model: Annotated[str, typer.Argument(help="A name in the store or on the hub, a directory or a .gguf file.")],
    vram: Annotated[
        str | None, typer.Option("--vram", help='Device memory: "4GiB", "80%", auto. Needs no GPU.')
    ] = None,
    ram: Annotated[
        str, typer.Option("--ram", help='Host memory: "16GiB", "50%", auto; 0 with a GPU: ring only.')
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda:N or auto.")] = "auto",
    store: StoreOption = None,
    max_sequences: Annotated[int, typer.Option("--max-sequences", min=1, help="Sequences that share a sweep.")] = 8,
    kv_tokens: Annotated[int | None, typer.Option("--kv-tokens", min=16, help="Tokens of key-value cache.")] = None,
    sweep_tokens: Annotated[int | None, typer.Option("--sweep-tokens", min=1, help="Tokens a sweep carries.")] = None,
    expert_cache: ExpertCacheOption = "auto",
    dtype: Annotated[str | None, typer.Option("--dtype", help=f"Compute in {', '.join(DTYPES)}.")] = None,
    disk_space: Annotated[str, typer.Option("--disk-space", help='Room for shards: "100GB", "50%", auto.')] = "auto",
    disk: Annotated[str | None, typer.Option("--disk", help="Disk, such as 2GB/s; else measured or assumed.")] = None,
    h2d: Annotated[str | None, typer.Option("--h2d", help="Host to device, such as 12GB/s.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Memory of the device, such as 256GB/s.")] = None,
    flops: Annotated[str | None, typer.Option("--flops", help="Operations a second, such as 6.5T.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="A row for every layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the hub.")] = False,
) -> None:
    """Show where a model's layers would live and be computed, and how fast it would run."""
    options = TargetOptions(device, vram, ram, disk, h2d, memory, flops)
    wishes = _Wishes(max_sequences, kv_tokens, sweep_tokens, dtype, disk_space, expert_cache)
    with plain_errors(), wrong_calls():
        report = _report(model, ShardStore(store or default_store_root()), options, wishes, offline=offline)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        report.print(each_layer=layers)


@dataclass(frozen=True)
class _Wishes:
    """What the user says of the engine, not of the machine."""

    max_sequences: int
    kv_tokens: int | None
    sweep_tokens: int | None
    dtype: str | None
    disk_space: str
    expert_cache: str


def _report(model: str, store: ShardStore, options: TargetOptions, wishes: _Wishes, *, offline: bool) -> PlanReport:
    if wishes.dtype is not None and wishes.dtype not in DTYPES:
        raise OptionError(f"--dtype is {wishes.dtype!r}; use one of {', '.join(DTYPES)}")
    target = find_target(options)
    source = find_model(model, store, offline=offline)
    dtype = _compute_dtype(wishes.dtype, source, target)
    sizes = sizes_of_source(source, dtype)
    shard_bytes, disk_bytes = _check_disk(source, sizes, store, wishes.disk_space)
    bandwidths, origins = bandwidths_of(target, options, files_of(source.shards), dtype)
    request = PlanRequest(
        device=target.device,
        vram=target.vram,
        ram=target.ram,
        bandwidths=bandwidths,
        max_sequences=wishes.max_sequences,
        kv_tokens=wishes.kv_tokens,
        sweep_tokens=wishes.sweep_tokens,
        expert_share=parse_share(wishes.expert_cache, "--expert-cache"),
    )
    plan = make_plan(sizes, request)
    return PlanReport(
        sizes=sizes,
        found_in=source.found_in,
        dtype=str(dtype).removeprefix("torch."),
        plan=plan,
        max_sequences=wishes.max_sequences,
        bandwidths=bandwidths,
        origins=origins,
        predictions=tuple(predict(sizes, plan, bandwidths, count) for count in SEQUENCES),
        shard_bytes=shard_bytes,
        disk_bytes=disk_bytes,
        is_card_here=target.here is not None,
    )


def _compute_dtype(asked: str | None, source: ModelSource, target: Target) -> torch.dtype:
    """As asked; else what an engine on that device would choose, or the stored type if the card is not here to ask."""
    if asked is not None:
        return torch_dtype(asked)
    if target.here is None:
        return source.torch_dtype
    return choose_dtype(None, source.torch_dtype, target.here, str(source.config.model_type))


def _check_disk(source: ModelSource, sizes: ModelSizes, store: ShardStore, disk_space: str) -> tuple[int, int]:
    """What the shards take and what they may take; shards that are in the store already fit by themselves.

    Raises:
        DiskFull: they do not fit.
        OptionError: `disk_space` cannot be understood.
    """
    weights = sum(sizes.layers) + sizes.embedding + sizes.head + sizes.other
    needed = weights + (len(sizes.layers) + 1) * DATA_ALIGNMENT
    place = store.root
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    taken = sum(path.stat().st_size for path in files_of(source.shards))
    is_auto = disk_space.strip().lower() == "auto"
    budget = usage.free + taken if is_auto else parse_budget(disk_space, usage.total, usage.free, "--disk-space")
    if needed > budget:
        raise DiskFull(
            f"the shards of {source.name} take {byte_size(needed)} and {byte_size(budget)} may be used under "
            f"{store.root}: {byte_size(needed - budget)} ({needed - budget:,} bytes) are missing. Free some, or give "
            "another place with --store.",
            needed,
            budget,
        )
    return needed, budget
