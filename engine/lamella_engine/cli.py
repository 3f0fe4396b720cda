"""The commands on models: ``lamella models ...`` and ``python -m lamella_engine ...``.

Owns arguments, output and exit codes: 0 for done, 1 for a model that cannot be had or is broken, 2 for a wrong call.
What is asked for goes to standard output, progress and errors to standard error. `shard_store` does the work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from lamella_engine import inspection
from lamella_engine.budget import parse_bytes
from lamella_engine.byte_size import byte_size
from lamella_engine.console_progress import ConsoleProgress
from lamella_engine.errors import EngineError, ModelError, OptionError, PlanError
from lamella_engine.inspection import CardFit, ModelFacts
from lamella_engine.manifest import ORIGINAL, Manifest
from lamella_engine.model_traits import Experts, Rotary
from lamella_engine.names import check_model_name
from lamella_engine.options import DTYPES
from lamella_engine.shard_store import PLAIN, ShardStore, default_store_root
from lamella_engine.stored_form import StoredForm

EXIT_FAILED = 1
EXIT_WRONG_CALL = 2

app = typer.Typer(
    name="models",
    help="The models of this host's shard cache: list, inspect, verify, remove, pull, import.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


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
    typer.Option("--quant", help="Pack weights: nf4, fp4, int8, lossless, or such as int8,layers.0-3=bf16."),
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
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")]
StoredName = Annotated[str, typer.Argument(help="The model's name in the store, as `list` shows it.")]


@app.command("list")
def list_models(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the models in the store."""
    with plain_errors():
        manifests, damaged = _store(store).list(), _store(store).damaged()
    for error in damaged:
        typer.echo(f"warning: {error}", err=True)
    if as_json:
        typer.echo(json.dumps([_summary(manifest) for manifest in manifests], indent=2))
    elif not manifests:
        typer.echo(f"no models in {_store(store).root}; add one with `pull NAME` or `import NAME PATH`")
    else:
        _print_columns([("NAME", "FAMILY", "LAYERS", "DTYPE", "SIZE", "FROM"), *map(_row, manifests)])


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A name in the store or on the hub, a directory or a .gguf file.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a model is and what would fit where; reads config and headers only."""
    with plain_errors():
        facts = inspection.inspect(model, _store(store))
    if as_json:
        typer.echo(json.dumps({**asdict(facts), "size_bytes": facts.size_bytes}, indent=2))
    else:
        _print_columns(_described(facts))


@app.command()
def verify(name: StoredName, store: StoreOption = None) -> None:
    """Hash every shard of a model and compare with what was built."""
    with plain_errors():
        opened = _store(store)
        opened.verify(name)
        manifest = opened.manifest(name)
    typer.echo(f"{name} is whole: {len(manifest.shards)} shards, {byte_size(manifest.size_bytes)}")


@app.command()
def remove(name: StoredName, store: StoreOption = None) -> None:
    """Delete a model's shards from the store; the source they were built from is not touched."""
    with plain_errors():
        _store(store).remove(name)
    typer.echo(f"removed {name}")


@app.command()
def pull(  # noqa: PLR0913  a command has as many arguments as options
    name: Annotated[str, typer.Argument(help="owner/name or owner/name@revision on the hub.")],
    store: StoreOption = None,
    dtype: DtypeOption = None,
    in_place: InPlaceOption = False,
    quant: QuantOption = None,
    quant_target_bytes: QuantTargetOption = None,
    quant_device: QuantDeviceOption = "auto",
    delete_original: DeleteOption = False,
) -> None:
    """Fetch a model from the hub and build its shards; does nothing if the store has it.

    With --quant a packed form beside it, from the store if the model is there.
    """
    form = _form(in_place, quant, quant_target_bytes, quant_device)
    _check_form(form, delete_original=delete_original)
    _build(name, None, store, BuildOptions(dtype, form))
    if delete_original:
        _delete_original(name, None, store)


@app.command("import")
def import_model(  # noqa: PLR0913  a command has as many arguments as options
    name: Annotated[str, typer.Argument(help="The name that the model gets in the store.")],
    path: Annotated[Path, typer.Argument(help="A checkpoint directory or a .gguf file.")],
    store: StoreOption = None,
    dtype: DtypeOption = None,
    in_place: InPlaceOption = False,
    quant: QuantOption = None,
    quant_target_bytes: QuantTargetOption = None,
    quant_device: QuantDeviceOption = "auto",
    delete_original: DeleteOption = False,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Convert pytorch_model.bin, in a process of its own; only if you trust it."
        ),
    ] = False,
) -> None:
    """Build shards from a checkpoint on this host; does nothing if the store has the model from it."""
    if allow_pickle and delete_original:
        raise typer.BadParameter(
            "--delete-original cannot go with --allow-pickle: pickles are not opened again to see whether the shards "
            "hold all that is in them. Look at the model, then delete them by hand."
        )
    form = _form(in_place, quant, quant_target_bytes, quant_device)
    if allow_pickle and (form.in_place or form.is_packed):
        raise typer.BadParameter(
            "--allow-pickle goes with neither --in-place nor --quant: import the pickles first, then `pull` the model "
            "with --quant"
        )
    _check_form(form, delete_original=delete_original)
    _build(name, path.expanduser(), store, BuildOptions(dtype, form, allow_pickle))
    if delete_original:
        _delete_original(name, path.expanduser(), store)


def _form(in_place: bool, quant: str | None, target: str | None, quant_device: str) -> StoredForm:
    with wrong_calls():
        nbytes = None if target is None else parse_bytes(target, "quant-target-bytes")
        return StoredForm(in_place, quant, nbytes, quant_device)


def _check_form(form: StoredForm, *, delete_original: bool) -> None:
    if form.in_place and delete_original:
        raise typer.BadParameter("--delete-original cannot go with --in-place, which reads from the original's files")
    if form.is_packed and delete_original:
        raise typer.BadParameter(
            "--delete-original cannot go with --quant: packed weights do not hold all that the original does"
        )


@dataclass(frozen=True)
class BuildOptions:
    """How a model is to be stored."""

    dtype: str | None = None
    form: StoredForm = PLAIN
    allow_pickle: bool = False


def _build(name: str, source: Path | None, root: Path | None, options: BuildOptions) -> None:
    with plain_errors(), wrong_calls():
        store = _store(root)
        before = {manifest.name for manifest in store.list()}
        check_model_name(name)
        with ConsoleProgress() as progress:
            if options.allow_pickle and source is not None:
                sharded = store.import_pickled(name, source, dtype=options.dtype, progress=progress)
            else:
                sharded = store.ensure(
                    _by_name(name, source), source=source, dtype=options.dtype, form=options.form, progress=progress,
                )  # fmt: skip
    name, is_there = sharded.name, sharded.name in before
    what = f"{len(sharded.layers)} layers, {sharded.dtype}, {byte_size(sharded.size_bytes)}"
    if options.form.in_place:
        num_placed = sum(shard.path.name.startswith(ORIGINAL) for shard in sharded.layers)
        what += f", {num_placed} of the layers read from the original's files"
    typer.echo(f"{name} is in the store already: {what}" if is_there else f"{name} is ready: {what}")


def _delete_original(name: str, named: Path | None, root: Path | None) -> None:
    with plain_errors(), ConsoleProgress() as progress:
        deleted = _store(root).delete_original(name, named, progress=progress)
    if deleted.files:
        typer.echo(f"deleted the original: {len(deleted.files)} files, {byte_size(deleted.nbytes)}")
    else:
        typer.echo("no original was deleted: none is left that this model was built from")
    for file in deleted.kept:
        typer.echo(f"warning: {file} stays: it is a link to a file elsewhere", err=True)


def _by_name(name: str, source: Path | None) -> str:
    """`name`, unless it is also a path here, which the store would take it for."""
    if source is None and Path(name).exists():
        raise ModelError(
            f"{name!r} is a path here; `import NAME {name}` builds from it. To fetch the model of that name from the "
            "hub, change to another directory."
        )
    return name


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


def _store(root: Path | None) -> ShardStore:
    return ShardStore(root or default_store_root())


def _summary(manifest: Manifest) -> dict[str, object]:
    return {
        "name": manifest.name,
        "revision": manifest.revision,
        "source_kind": manifest.source_kind,
        "source": manifest.source,
        "family": manifest.family,
        "dtype": manifest.dtype,
        "num_layers": len(manifest.layers),
        "size_bytes": manifest.size_bytes,
    }


def _row(manifest: Manifest) -> tuple[str, ...]:
    size = byte_size(manifest.size_bytes)
    return (manifest.name, manifest.family, str(len(manifest.layers)), manifest.dtype, size, manifest.source)


def _dtype(facts: inspection.ModelFacts) -> str:
    if not facts.packing:
        return facts.dtype
    return f"{facts.dtype}, {'stored as' if facts.found_in == 'store' else 'expanded from'} {facts.packing}"


def _described(facts: ModelFacts) -> list[tuple[str, str]]:
    rows = [
        ("model", f"{facts.name} ({facts.found_in})"),
        ("revision", facts.revision or "-"),
        ("family", f"{facts.imported_from}, runs as {facts.family}" if facts.imported_from else facts.family),
        ("runs here", "yes" if facts.obstacle is None else f"no: {facts.obstacle}"),
        ("dtype", _dtype(facts)),
        ("layers", _kinds(facts)),
    ]
    if facts.size_bytes:
        rows += [
            ("parameters", f"{facts.parameters:,}"),
            ("size", byte_size(facts.size_bytes)),
            ("layer size", _span(facts.layer_bytes_min, facts.layer_bytes_max)),
            ("outside layers", f"{byte_size(facts.root_bytes)}, always resident"),
        ]
    if facts.experts is not None:
        rows += [("experts", _experts(facts.experts, facts.num_layers))]
        rows += [("a token meets", f"{facts.active_parameters:,} parameters")]
    rows += [
        ("hidden size", str(facts.hidden_size)),
        ("attention heads", f"{facts.attention_heads or '-'}, key-value heads {_several(facts.kv_heads)}"),
        ("head width", f"keys {_several(facts.key_widths)}, values {_several(facts.value_widths)}"),
        *(("rotary", _rotary(rotary)) for rotary in facts.rotary),
        *([("positions", "linear biases (ALiBi), a slope for each head")] if facts.has_linear_biases else []),
        ("context", f"{facts.context_length} tokens" if facts.context_length else "no limit named"),
        ("sliding window", f"{facts.sliding_window} tokens" if facts.sliding_window else "none"),
        ("vocabulary", f"{facts.vocabulary}, embeddings {'tied' if facts.tied_embeddings else 'not tied'}"),
        ("keys and values", f"at most {byte_size(facts.kv_bytes_per_token)} a token"),
        ("state", f"at most {byte_size(facts.state_bytes)} a sequence" if facts.state_bytes else "none"),
    ]
    return rows + [(f"on {byte_size(card.card_bytes)}", _fit(card, facts)) for card in facts.cards]


def _kinds(facts: ModelFacts) -> str:
    kinds = (f"{count} of {kind.replace('_', ' ')}" for kind, count in facts.layer_kinds.items())
    return f"{facts.num_layers}: {', '.join(kinds)}"


def _experts(experts: Experts, num_layers: int) -> str:
    shared = f", {byte_size(experts.shared_bytes)} in shared ones" if experts.shared_bytes else ""
    return (
        f"{experts.count} of {byte_size(experts.expert_bytes)} in {experts.layers} of {num_layers} layers, a token "
        f"visits {experts.routed}; {byte_size(experts.nbytes)} in all{shared}"
    )


def _rotary(rotary: Rotary) -> str:
    parts = [rotary.kind] + ([] if rotary.base is None else [f"base {rotary.base:g}"])
    parts += [] if rotary.share == 1.0 else [f"{rotary.share:.0%} of a head"]
    parts += [] if rotary.factor is None else [f"context stretched {rotary.factor:g} times"]
    return ", ".join(parts) + (f" ({rotary.layers.replace('_', ' ')})" if rotary.layers else "")


def _fit(card: CardFit, facts: ModelFacts) -> str:
    if not card.runs:
        return "does not run: too small for what lies outside the layers, one layer and 2048 tokens of keys and values"
    if card.resident_layers == facts.num_layers:
        return "runs; there is room for the whole model"
    return f"runs; beside the layers on their way there is room for {card.resident_layers} of {facts.num_layers}"


def _span(low: int, high: int) -> str:
    return byte_size(low) if low == high else f"{byte_size(low)} to {byte_size(high)}"


def _several(values: Iterable[int]) -> str:
    return " or ".join(str(value) for value in values) or "-"


def _print_columns(rows: list[tuple[str, ...]] | list[tuple[str, str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())
