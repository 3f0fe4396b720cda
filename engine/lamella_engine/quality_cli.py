"""``lamella quality MODEL --quant X``: what a packed model loses against full precision, on a text, with intervals.

Owns options, tables, JSON and exit codes: 0 for a measurement, 1 for a model or a text that cannot be had or does not
fit, 2 for a wrong call. Progress goes to standard error. `quality` measures.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lamella_engine import names
from lamella_engine.byte_size import byte_size
from lamella_engine.cli_options import (
    ExpertCacheOption,
    QuantOption,
    StoreOption,
    device_budget,
    plain_errors,
    wrong_calls,
)
from lamella_engine.console_progress import ConsoleProgress
from lamella_engine.errors import OptionError
from lamella_engine.options import DTYPES, EngineOptions
from lamella_engine.peer_address import Peers
from lamella_engine.quality import DEFAULT_TOKENS, QualityReport, QualityRequest, run_quality
from lamella_engine.quality_figures import Figure
from lamella_engine.quality_text import read_text
from lamella_engine.quant_spec import parse_quant
from lamella_engine.shard_store import ShardStore, default_store_root
from lamella_engine.stored_form import StoredForm
from lamella_engine.sweep_profile import plain_console

app = typer.Typer(name="quality", pretty_exceptions_enable=False, add_completion=False)


@app.command()
def quality(  # noqa: PLR0913  a command has as many arguments as options
    model: Annotated[str, typer.Argument(help="A name in the store or on the hub, a directory or a .gguf file.")],
    quant: QuantOption = None,
    text: Annotated[Path | None, typer.Option("--text", help="A UTF-8 file; else the novel that ships.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens scored at most.")] = DEFAULT_TOKENS,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens of a window; else 512, or the context if that is less.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda:N or auto.")] = "auto",
    store: StoreOption = None,
    vram: Annotated[
        str | None, typer.Option("--vram", help='Device memory for both models: "4GiB", "80%", auto.')
    ] = None,
    ram: Annotated[
        str, typer.Option("--ram", help='Host memory for both models: "16GiB", "50%", auto; 0 keeps no layer in it.')
    ] = "auto",
    expert_cache: ExpertCacheOption = "auto",
    dtype: Annotated[str | None, typer.Option("--dtype", help=f"Compute in {', '.join(DTYPES)}.")] = None,
    reference_dtype: Annotated[
        str | None, typer.Option("--reference-dtype", help="What full precision computes in; else as --dtype.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the hub.")] = False,
) -> None:
    """Measure perplexity, divergence and agreement of a packed model against full precision."""
    with plain_errors(), wrong_calls():
        spec = _spec(model, quant, (dtype, reference_dtype))
        _check_dtype(reference_dtype)
        options = EngineOptions(
            store=store or default_store_root(),
            device=device,
            dtype=dtype,
            vram=device_budget(vram, device),
            ram=ram,
            expert_cache=expert_cache,
            offline=offline,
        )
        request = QualityRequest(read_text(text), options, reference_dtype, tokens, window)
        report = _measure(model, spec, request)
    if as_json:
        typer.echo(json.dumps({"quant": spec, **asdict(report)}, indent=2))
    else:
        _print(report, spec)


def _measure(model: str, spec: str | None, request: QualityRequest) -> QualityReport:
    options = request.options
    base = _base_of(model)
    with ConsoleProgress() as progress:
        opened = ShardStore(options.store, peers=Peers.from_environment())
        reference = candidate = opened.ensure(base or model, offline=options.offline, progress=progress)
        if spec is not None or base is not None:
            form = StoredForm(quant=spec, quant_device=options.device)
            candidate = opened.ensure(model, form=form, offline=options.offline, progress=progress)
    with ConsoleProgress(unit="tokens") as progress:
        return run_quality(reference, candidate, request, progress)


def _base_of(model: str) -> str | None:
    """The model that `model` is a packed form of, by its name; None for a model itself, or a path."""
    if not names.is_model_name(model):
        return None
    base, variant = names.split_variant(model)
    return None if variant is None else base


def _spec(model: str, quant: str | None, dtypes: tuple[str | None, str | None]) -> str | None:
    """What to pack, in one way of writing; None where the name says it, or only compute types differ.

    Raises:
        OptionError: it cannot be understood, or there is nothing to compare.
    """
    spec = None if quant is None else parse_quant(quant)
    if spec is not None and not spec.packs_nothing:
        if (base := _base_of(model)) is not None:
            raise OptionError(f"{model} is packed already; give --quant with {base}, or leave it out")
        return str(spec)
    dtype, reference_dtype = dtypes
    if _base_of(model) is None and (reference_dtype is None or reference_dtype == dtype):
        raise OptionError(
            "there is nothing to compare: say what to pack with --quant, such as --quant int8, or give --dtype and "
            "--reference-dtype to compare two compute types"
        )
    return None


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"--reference-dtype is {dtype!r}; use one of {', '.join(DTYPES)}")


def _print(report: QualityReport, spec: str | None) -> None:
    console = plain_console()
    figures, full, packed = report.figures, report.reference, report.candidate
    name = spec or (packed.name.rpartition("~")[2] if packed.name != full.name else packed.dtype)
    console.print(
        f"{full.name}: {name} ({byte_size(packed.size_bytes)}, computed in {packed.dtype}) against full precision "
        f"({byte_size(full.size_bytes)}, computed in {full.dtype}), on {report.device}",
        markup=False,
    )
    table = Table("", "measured", "95 % interval", title="Against full precision", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("perplexity, full precision", *_cells(figures.reference_perplexity, "{:.3f}"))
    table.add_row(f"perplexity, {name}", *_cells(figures.candidate_perplexity, "{:.3f}"))
    table.add_row("perplexity, ratio", *_cells(figures.perplexity_ratio, "{:.5f}"))
    table.add_row("KL divergence, nats a token", *_cells(figures.divergence, "{:.3g}"))
    table.add_row("KL divergence, 99th percentile", f"{figures.divergence_p99:.3g}", "")
    table.add_row("same first choice", *_cells(figures.agreement, "{:.2%}"))
    console.print(table)
    console.print(
        f"{figures.tokens} tokens scored in {figures.windows} windows of {report.window}, at least half of each as "
        f"context; {report.sweeps} sweeps of each model, {report.seconds:.1f} s",
        markup=False,
    )
    console.print(f"text: {report.text} (SHA-256 {report.text_sha256[:12]})", markup=False)


def _cells(figure: Figure, form: str) -> tuple[str, str]:
    return form.format(figure.value), f"{form.format(figure.low)} to {form.format(figure.high)}"
