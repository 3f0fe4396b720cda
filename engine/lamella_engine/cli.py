"""The commands on models: ``lamella models ...`` and ``python -m lamella_engine ...``.

Owns arguments, output and exit codes: 0 for done, 1 for a model that cannot be had or is broken, 2 for a wrong call.
What is asked for goes to standard output, progress and errors to standard error. `shard_store` does the work.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from lamella_engine import inspection
from lamella_engine.budget import parse_bytes
from lamella_engine.byte_size import byte_size
from lamella_engine.cli_options import (
    DeleteOption,
    DtypeOption,
    FromOption,
    InPlaceOption,
    JsonOption,
    OfflineOption,
    QuantDeviceOption,
    QuantOption,
    QuantTargetOption,
    StoredName,
    StoreOption,
    open_store,
    plain_errors,
    print_columns,
    wrong_calls,
)
from lamella_engine.console_progress import ConsoleProgress
from lamella_engine.errors import ModelError, OptionError
from lamella_engine.inspect_report import described_facts
from lamella_engine.manifest import ORIGINAL, Manifest
from lamella_engine.names import check_model_name
from lamella_engine.originals import Deleted
from lamella_engine.peer_address import Peers
from lamella_engine.peer_cli import share
from lamella_engine.shard_store import NO_PEERS
from lamella_engine.store_room import Occupant
from lamella_engine.stored_form import StoredForm
from lamella_engine.wanted_model import PLAIN

app = typer.Typer(
    name="models",
    help="The models of this host's shard cache: list, inspect, verify, remove, pull, import, share, quota, prune. "
    "Of a running service: `where NAME` shows who serves a model, `pull NAME --on WORKER` has a worker fetch it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


app.command()(share)


@app.command("list")
def list_models(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the models in the store."""
    with plain_errors():
        opened = open_store(store)
        manifests, damaged = opened.list(), opened.damaged()
        occupants = {each.name: each for each in opened.room.occupants()}
    for error in damaged:
        typer.echo(f"warning: {error}", err=True)
    listed = [(manifest, occupants[manifest.name]) for manifest in manifests if manifest.name in occupants]
    if as_json:
        typer.echo(json.dumps([_summary(*each) for each in listed], indent=2))
    elif not listed:
        typer.echo(f"no models in {opened.root}; add one with `pull NAME` or `import NAME PATH`")
    else:
        print_columns(
            [("NAME", "FAMILY", "LAYERS", "DTYPE", "SIZE", "LAST USED", "FROM"), *(_row(*each) for each in listed)]
        )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A name in the store or on the hub, a directory or a .gguf file.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a model is and what would fit where; reads config and headers only."""
    with plain_errors():
        facts = inspection.inspect(model, open_store(store))
    if as_json:
        typer.echo(json.dumps({**asdict(facts), "size_bytes": facts.size_bytes}, indent=2))
    else:
        print_columns(described_facts(facts))


@app.command()
def verify(name: StoredName, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Hash every shard of a model and compare with what was built."""
    with plain_errors():
        opened = open_store(store)
        opened.verify(name)
        manifest = opened.manifest(name)
    if as_json:
        told = {"name": name, "is_whole": True, "num_shards": len(manifest.shards), "size_bytes": manifest.size_bytes}
        typer.echo(json.dumps(told))
        return
    typer.echo(f"{name} is whole: {len(manifest.shards)} shards, {byte_size(manifest.size_bytes)}")


@app.command()
def remove(name: StoredName, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Delete a model's shards from the store; the source they were built from is not touched."""
    with plain_errors():
        open_store(store).remove(name)
    typer.echo(json.dumps({"removed": [name]}) if as_json else f"removed {name}")


@app.command()
def quota(
    size: Annotated[str | None, typer.Argument(help='What all models may take, such as "200GiB"; or none.')] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show or set what all models of the store may take; those unused for longest go when another needs room."""
    with plain_errors(), wrong_calls():
        room = open_store(store).room
        if size is not None:
            room.set_quota(None if size.strip().lower() == "none" else parse_bytes(size, "quota"))
        limit, taken = room.quota, sum(each.nbytes for each in room.occupants())
    if as_json:
        typer.echo(json.dumps({"quota_bytes": limit, "taken_bytes": taken}))
        return
    allowed = "no quota is set" if limit is None else f"the quota is {byte_size(limit)}"
    typer.echo(f"{allowed}; the models take {byte_size(taken)}")
    if limit is not None and taken > limit:
        typer.echo("that is more: `lamella models prune` removes what is not in use now", err=True)


@app.command()
def prune(
    to: Annotated[
        str | None, typer.Option("--to", help='Remove until all take this, "100GiB"; else the quota.')
    ] = None,
    store: StoreOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove the models that were not used for longest, until the rest fits; what is in use stays."""
    with plain_errors(), wrong_calls():
        room = open_store(store).room
        most = room.quota if to is None else 0 if to.strip() == "0" else parse_bytes(to, "to")
        if most is None:
            raise OptionError("no quota is set; say how much may stay with --to, or set one with `models quota SIZE`")
        removed = room.choose(most) if dry_run else room.shrink(most)
    if as_json:
        gone = [{"name": each.name, "size_bytes": each.nbytes} for each in removed]
        typer.echo(json.dumps({"is_dry_run": dry_run, "removed": gone}, indent=2))
        return
    for each in removed:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {each.name}: {byte_size(each.nbytes)}")
    if not removed:
        typer.echo("nothing has to go")


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
    sources: FromOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a model into the store: from a peer (--from, else LAMELLA_PEERS), else from the hub.

    Does nothing if the store has it. With --quant a packed form beside it, from the store if the model is there.
    `lamella models pull NAME --on WORKER` has a worker do it, on its host.
    """
    form = _form(in_place, quant, quant_target_bytes, quant_device)
    _check_form(form, delete_original=delete_original)
    with wrong_calls():
        if sources and in_place:
            raise OptionError("--in-place reads the original's files, which no peer has; leave one of the two out")
        peers = Peers.from_environment() if sources is None else Peers.named(sources)
    built = _build(name, None, store, BuildOptions(dtype, form, peers=peers, offline=offline))
    _finish(built, (name, None, store) if delete_original else None, as_json=as_json)


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
    as_json: JsonOption = False,
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
    built = _build(name, path.expanduser(), store, BuildOptions(dtype, form, allow_pickle))
    _finish(built, (name, path.expanduser(), store) if delete_original else None, as_json=as_json)


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
    peers: Peers = NO_PEERS
    offline: bool = False


@dataclass(frozen=True)
class Built:
    """A model that is in the store now; `num_in_place` of its layers are read from the original's files."""

    name: str
    is_new: bool
    num_layers: int
    num_in_place: int
    dtype: str
    size_bytes: int


def _build(name: str, source: Path | None, root: Path | None, options: BuildOptions) -> Built:
    with plain_errors(), wrong_calls():
        store = open_store(root, options.peers)
        before = {manifest.name for manifest in store.list()}
        check_model_name(name)
        with ConsoleProgress() as progress:
            if options.allow_pickle and source is not None:
                sharded = store.import_pickled(name, source, dtype=options.dtype, progress=progress)
            else:
                sharded = store.ensure(
                    _by_name(name, source), source=source, dtype=options.dtype, form=options.form,
                    offline=options.offline, progress=progress,
                )  # fmt: skip
    return Built(
        sharded.name,
        sharded.name not in before,
        len(sharded.layers),
        sum(shard.path.name.startswith(ORIGINAL) for shard in sharded.layers),
        str(sharded.dtype),
        sharded.size_bytes,
    )


def _delete_original(name: str, named: Path | None, root: Path | None) -> Deleted:
    with plain_errors(), ConsoleProgress() as progress:
        return open_store(root).delete_original(name, named, progress=progress)


def _finish(built: Built, original: tuple[str, Path | None, Path | None] | None, *, as_json: bool) -> None:
    """Say what is in the store now; delete the `original`, if one is given, and say that too."""
    if not as_json:
        what = f"{built.num_layers} layers, {built.dtype}, {byte_size(built.size_bytes)}"
        if built.num_in_place:
            what += f", {built.num_in_place} of the layers read from the original's files"
        typer.echo(
            f"{built.name} is ready: {what}" if built.is_new else f"{built.name} is in the store already: {what}"
        )
    deleted = None if original is None else _delete_original(*original)
    if as_json:
        gone = None if deleted is None else {"num_files": len(deleted.files), "size_bytes": deleted.nbytes}
        typer.echo(json.dumps({**asdict(built), "deleted_original": gone}, indent=2))
    elif deleted is not None and deleted.files:
        typer.echo(f"deleted the original: {len(deleted.files)} files, {byte_size(deleted.nbytes)}")
    elif deleted is not None:
        typer.echo("no original was deleted: none is left that this model was built from")
    for file in () if deleted is None else deleted.kept:
        typer.echo(f"warning: {file} stays: it is a link to a file elsewhere", err=True)


def _by_name(name: str, source: Path | None) -> str:
    """`name`, unless it is also a path here, which the store would take it for."""
    if source is None and Path(name).exists():
        raise ModelError(
            f"{name!r} is a path here; `import NAME {name}` builds from it. To fetch the model of that name from the "
            "hub, change to another directory."
        )
    return name


def _summary(manifest: Manifest, occupant: Occupant) -> dict[str, object]:
    return {
        "name": manifest.name,
        "revision": manifest.revision,
        "source_kind": manifest.source_kind,
        "source": manifest.source,
        "family": manifest.family,
        "dtype": manifest.dtype,
        "num_layers": len(manifest.layers),
        "size_bytes": manifest.size_bytes,
        "own_bytes": occupant.nbytes,
        "used_at": occupant.used_at,
        "is_in_use": occupant.is_in_use,
    }


def _row(manifest: Manifest, occupant: Occupant) -> tuple[str, ...]:
    size = byte_size(manifest.size_bytes)
    return (
        *(manifest.name, manifest.family, str(len(manifest.layers)), manifest.dtype),
        *(size, _last_used(occupant), manifest.source),
    )


def _last_used(occupant: Occupant) -> str:
    if occupant.is_in_use:
        return "in use"
    passed_s = max(0.0, time.time() - occupant.used_at)
    for unit_s, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if passed_s >= unit_s:
            return f"{passed_s // unit_s:.0f} {unit} ago"
    return "just now"
