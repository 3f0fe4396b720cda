"""``lamella bench MODEL``: opens the engine here, decodes, and prints what it reached beside what the machine allows.

Owns options, tables, JSON and exit codes: 0 for a measurement, 1 for a model that does not fit or cannot be had, 2 for
a wrong call. Progress goes to standard error. `bench` measures.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lamella_engine.bench import BenchReport, BenchRequest, run_bench
from lamella_engine.byte_size import byte_size
from lamella_engine.cli_options import ExpertCacheOption, StoreOption, device_budget, plain_errors, wrong_calls
from lamella_engine.console_progress import ConsoleProgress
from lamella_engine.errors import OptionError
from lamella_engine.options import DTYPES, EngineOptions
from lamella_engine.peer_address import Peers
from lamella_engine.shard_store import ShardStore, default_store_root
from lamella_engine.sweep_profile import plain_console, profile_table

app = typer.Typer(name="bench", pretty_exceptions_enable=False, add_completion=False)


@app.command()
def bench(  # noqa: PLR0913  a command has as many arguments as options
    model: Annotated[str, typer.Argument(help="A name in the store or on the hub, a directory or a .gguf file.")],
    device: Annotated[str, typer.Option("--device", help="cpu, cuda:N or auto.")] = "auto",
    store: StoreOption = None,
    vram: Annotated[str | None, typer.Option("--vram", help='Device memory: "4GiB", "80%", auto.')] = None,
    ram: Annotated[
        str, typer.Option("--ram", help='Host memory: "16GiB", "50%", auto; 0 keeps no layer in it.')
    ] = "auto",
    expert_cache: ExpertCacheOption = "auto",
    dtype: Annotated[str | None, typer.Option("--dtype", help=f"Compute in {', '.join(DTYPES)}.")] = None,
    sequences: Annotated[str, typer.Option("--sequences", help="How many decode side by side.")] = "1,8,64",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Sweeps timed for each of them.")] = 12,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompts.")] = 32,
    kv_tokens: Annotated[
        int | None, typer.Option("--kv-tokens", min=16, help="Tokens of key-value cache; else as many as are needed.")
    ] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write a Chrome trace of the last sweeps.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the hub.")] = False,
) -> None:
    """Measure seconds a sweep and tokens a second here, beside the limit of this machine."""
    with plain_errors(), wrong_calls():
        options = EngineOptions(
            store=store or default_store_root(),
            device=device,
            dtype=dtype,
            kv_tokens=kv_tokens,
            vram=device_budget(vram, device),
            ram=ram,
            expert_cache=expert_cache,
            offline=offline,
        )
        request = BenchRequest(_counts(sequences), tokens, prompt_tokens, options, trace)
        report = _measure(model, request)
    if as_json:
        typer.echo(json.dumps(_as_json(report), indent=2))
    else:
        _print(report)


def _measure(model: str, request: BenchRequest) -> BenchReport:
    options = request.options
    with ConsoleProgress() as progress:  # closed before anything is timed
        store = ShardStore(options.store, peers=Peers.from_environment())
        sharded = store.ensure(model, offline=options.offline, progress=progress)
    return run_bench(sharded, request, lambda text: typer.echo(text, err=True))


def _counts(text: str) -> tuple[int, ...]:
    """Numbers of sequences from a text such as ``1,8,64``, each once."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise OptionError(f"--sequences is {text!r}; use numbers with commas between them, such as 1,8,64") from error


def _as_json(report: BenchReport) -> dict[str, object]:
    """Plain values; a bandwidth that is endless (a CPU copies nothing) is null."""
    figures = asdict(report)
    rates = {name: getattr(report.bandwidths, name) for name in ("disk", "h2d", "device_memory", "flops")}
    figures["bandwidths"] = {name: None if math.isinf(rate) else rate for name, rate in rates.items()}
    figures["trace"] = None if report.trace is None else str(report.trace)
    return figures


def _print(report: BenchReport) -> None:
    console = plain_console()
    facts = report.facts
    console.print(
        f"{facts.model}: {facts.num_layers} layers, {byte_size(facts.size_bytes)}, computed on {facts.device} in "
        f"{facts.dtype}, open after {report.open_s:.1f} s; prompts of {report.prompt_tokens} tokens",
        markup=False,
    )
    console.print(_speed_table(report))
    console.print(
        profile_table([(row.num_sequences, row.profile) for row in report.rows], "A sweep: weights of layers, seconds")
    )
    for line in (*_layer_notes(report), *_notes(report)):
        console.print(line, markup=False)


def _speed_table(report: BenchReport) -> Table:
    table = Table(
        "sequences", "s/sweep", "tokens/s", "limit s/sweep", "limit", "efficiency",
        title="Measured, beside what this machine allows", title_justify="left",
    )  # fmt: skip
    for column in table.columns:
        column.justify = "right"
    for row in report.rows:
        table.add_row(
            str(row.num_sequences),
            f"{row.s_per_sweep:.4f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.limit.seconds:.4f}",
            row.limit.binding,
            f"{100 * row.efficiency:.0f} %",
        )
    return table


def _layer_notes(report: BenchReport) -> list[str]:
    """What a layer takes once its bytes are there: expanding them, and the rest."""
    rest = ", ".join(f"{1e3 * row.other_s_per_layer:.3f} ms ({row.num_sequences})" for row in report.rows)
    expansion = report.expansion
    if not expansion.sweep_s:
        return [f"a layer takes, beside moving it (sequences): {rest}"]
    layers = [seconds for seconds in expansion.layers_s if seconds]
    told = [f"{len(layers)} layers, {1e3 * sum(layers) / len(layers):.3f} ms each"] if layers else []
    told += [f"the head, {1e3 * expansion.head_s:.3f} ms"] if expansion.head_s else []
    return [
        f"expanding packed weights: {1e3 * expansion.sweep_s:.3f} ms of a sweep ({'; '.join(told)})",
        f"what else a layer takes, beside moving it (sequences): {rest}",
    ]


def _notes(report: BenchReport) -> list[str]:
    rates, memory, plan = report.bandwidths, report.memory, report.plan
    lanes = [f"disk {rates.disk / 1e9:.1f} GB/s"]
    lanes += [] if math.isinf(rates.h2d) else [f"bus {rates.h2d / 1e9:.1f} GB/s"]
    lanes += [f"memory {rates.device_memory / 1e9:.1f} GB/s", f"arithmetic {rates.flops / 1e12:.2f} TFLOPS"]
    notes = [f"measured in this run: {', '.join(lanes)}"]
    if not report.is_disk_direct:
        notes.append("the disk refuses reads past the file cache: what is read may come from there")
    notes.append(f"peak memory of this process: {byte_size(memory.peak_rss)}")
    if memory.peak_device_reserved is not None and plan.vram is not None:
        notes.append(f"device memory: {byte_size(memory.peak_device_reserved)} of {byte_size(plan.vram.budget)}")
    if memory.peak_pinned is not None:
        notes.append(f"pinned memory: {byte_size(memory.peak_pinned)} of {byte_size(plan.ram.budget)}")
    if report.trace is not None:
        notes.append(f"trace: {report.trace}, for chrome://tracing or ui.perfetto.dev")
    return notes
