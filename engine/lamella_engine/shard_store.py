"""The store of shards on one host: models in, checked models out, whoever asks and however many at once.

Owns names, publication, locks and the decision whether what is stored is what was asked for. `shard_builder` builds,
`shard_check` checks, `hub` and the checkpoints supply. Layout: see `manifest`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from lamella_engine import hub_source, names, originals, peer_fetch, shard_builder, shard_repair
from lamella_engine.build_plan import BuildRequest
from lamella_engine.device import resolve_device
from lamella_engine.errors import ModelError, ModelNotFound, OptionError, ShardError
from lamella_engine.gguf_checkpoint import GgufCheckpoint
from lamella_engine.manifest import MANIFEST_FILE, Manifest, read_manifest
from lamella_engine.model_lock import ModelLock
from lamella_engine.model_use import LOCKS_DIRECTORY, using
from lamella_engine.open_source import open_source
from lamella_engine.options import DTYPES
from lamella_engine.originals import Deleted
from lamella_engine.peer_address import Peers
from lamella_engine.pickled_checkpoint import PickledCheckpoint
from lamella_engine.progress import Progress, silent
from lamella_engine.shard import ShardedModel
from lamella_engine.shard_check import check_files, read_shards
from lamella_engine.shard_writer import as_model_error
from lamella_engine.store_room import CONVERTED_DIRECTORY, StoreRoom
from lamella_engine.stored_checkpoint import StoredCheckpoint
from lamella_engine.stored_form import StoredForm, meaning_of, packed_variant
from lamella_engine.wanted_model import PLAIN, WantedModel
from lamella_engine.weight_files import has_weights
from lamella_engine.weight_source import SourceKind, WeightSource

logger = logging.getLogger(__name__)

STORE_VARIABLE = "LAMELLA_STORE"
BUILD_WAIT_S = 2 * 3600.0


def default_store_root() -> Path:
    """The directory in LAMELLA_STORE, else ``~/.cache/lamella/shards``."""
    return Path(os.environ.get(STORE_VARIABLE) or "~/.cache/lamella/shards").expanduser()


NO_PEERS = Peers()
_Local = WeightSource | PickledCheckpoint


class ShardStore:
    """A directory of sharded models; any number of processes may use it at once.

    Args:
        root: the directory; made when the first model is built.
        build_wait_s: how long to wait for another process that builds the same model, in seconds.
        peers: whose stores are asked for a model that has to come from elsewhere, before the hub is.

    Attributes:
        room: its quota, and what is removed for it.
    """

    def __init__(self, root: Path, *, build_wait_s: float = BUILD_WAIT_S, peers: Peers = NO_PEERS) -> None:
        self.root = Path(root).expanduser()
        self._peers = peers
        self._build_wait_s = build_wait_s
        self.room = StoreRoom(self.root)

    def ensure(
        self,
        model: str | Path,
        *,
        source: Path | None = None,
        dtype: str | None = None,
        form: StoredForm = PLAIN,
        offline: bool = False,
        hub_token: str | None = None,
        progress: Progress | None = None,
    ) -> ShardedModel:
        """Open `model`, building its shards first if the store lacks them, or those of them that are damaged.

        Args:
            model: a name in the store; else a checkpoint directory or ``.gguf`` file; else ``owner/name[@revision]``
                on the hub.
            source: checkpoint directory or ``.gguf`` file to build from; `model` is then the name it gets.
            dtype: torch dtype name to store the weights in; None keeps the source's (float32 for GGUF).
            form: in place or packed; a packed form is built from the model in the store if that is there.
            offline: never ask the hub.
            hub_token: access token for the hub; None means the usual places.
            progress: told about downloads, building and checking.

        Raises:
            ModelNameError, ModelNotFound, UnsupportedModel, CheckpointError, ShardError, DiskFull: see `errors`.
            ModelError: the store has a model of that name from elsewhere or in another dtype, or another process
                works on it for longer than `build_wait_s`.
        """
        _check_dtype(dtype)
        wanted = self._formed(self._wanted(model, source, dtype), form)
        return self._ensured(wanted, self._local(wanted), offline, hub_token, progress or silent)

    def _ensured(
        self, wanted: WantedModel, local: _Local | None, offline: bool, hub_token: str | None, report: Progress
    ) -> ShardedModel:
        manifest = self._current(wanted, local)
        if manifest is None:
            try:
                with self._lock(wanted.name).held(wanted.name, self._build_wait_s):
                    manifest = self._current(wanted, local) or self._build(wanted, local, offline, hub_token, report)
            except OSError as error:
                raise as_model_error(error, self.root, 0) from error
        try:
            return self._open(manifest, report)
        except ShardError as error:
            return self._open(self._repaired(manifest, error, offline, hub_token, report), report)

    def _repaired(
        self, manifest: Manifest, error: ShardError, offline: bool, hub_token: str | None, report: Progress
    ) -> Manifest:
        request = shard_repair.request_again(manifest, self._stored, hub_token, report, offline=offline)
        if request is None:
            raise error
        with self._lock(manifest.name).held(manifest.name, self._build_wait_s):
            shard_repair.set_aside(manifest, self.build_directory(manifest), self.root)
            return self._built(request, report)

    def import_pickled(
        self, name: str, path: Path, *, dtype: str | None = None, progress: Progress | None = None
    ) -> ShardedModel:
        """Open `name`, building it first from a directory of pickled weights, which the caller trusts.

        Args:
            name: the name that the model gets.
            path: directory with ``pytorch_model.bin`` or its index; see `pickled_checkpoint` for how they are opened.
            dtype, progress: as for `ensure`.

        Raises:
            CheckpointError: a pickle holds anything but tensors, or is damaged; nothing is left behind.
            ModelError: as for `ensure`.
        """
        _check_dtype(dtype)
        pickled = PickledCheckpoint.open(Path(os.path.expanduser(path)))
        return self._ensured(self._wanted(name, pickled.path, dtype), pickled, False, None, progress or silent)

    def delete_original(self, name: str, named: Path | None = None, *, progress: Progress | None = None) -> Deleted:
        """Delete the weight files that the model was built from, once its shards are proved to be whole.

        Args:
            name: a model of the store.
            named: the directory or file that the caller means; files of a checkpoint on this host are deleted only if
                it is the one that was built from. A model from the hub was fetched by the store's own doing.
            progress: told of checking.

        Returns:
            What was deleted; nothing if the original is gone already, or was not named.

        Raises:
            ShardError: the shards are not whole; nothing was deleted.
            ModelError: the original changed since, or holds more than the shards do; nothing was deleted.
        """
        manifest = self._published(name)
        try:
            with self._lock(name).held(name, self._build_wait_s):
                self.verify(name, progress=progress)
                return originals.delete(manifest, named, self.root)
        except OSError as error:
            raise as_model_error(error, self.root, 0) from error

    def open(self, name: str, *, progress: Progress | None = None) -> ShardedModel:
        """Open a model that is in the store.

        Raises:
            ModelNotFound: it is not.
            ShardError: a file is missing, truncated or altered.
        """
        return self._open(self._published(name), progress or silent)

    def list(self) -> tuple[Manifest, ...]:
        """The models in the store, by name; damaged ones are left out, see `damaged`."""
        found = (manifest for manifest in self._scan() if isinstance(manifest, Manifest))
        return tuple(sorted(found, key=lambda manifest: manifest.name))

    def damaged(self) -> tuple[ShardError, ...]:
        """What is wrong with models whose manifest cannot be used."""
        return tuple(error for error in self._scan() if isinstance(error, ShardError))

    def verify(self, name: str, *, progress: Progress | None = None) -> Manifest:
        """Hash every file of the model, whatever was checked before.

        Raises:
            ModelNotFound: it is not in the store.
            ShardError: a file is missing, truncated or altered.
        """
        manifest = self._published(name)
        check_files(manifest, self.build_directory(manifest), use_stamps=False, progress=progress or silent)
        read_shards(manifest, self.build_directory(manifest))
        return manifest

    def remove(self, name: str) -> int:
        """Remove the model, or what a killed build left of it; return the bytes freed.

        Processes that have it open go on: the files they opened stay readable to them.

        Raises:
            ModelNotFound: there is nothing of that name.
            ModelError: another process is building it.
        """
        if not any(place.is_dir() for place in (self._directory(name), self._converted(name))):
            raise self._not_found(name)
        return self.room.remove_anyway(name)

    def has(self, name: str) -> bool:
        """True if a model of that name is published."""
        return self._is_published(name)

    def manifest(self, name: str) -> Manifest:
        """What is published under `name`; no shard is looked at.

        Raises:
            ModelNotFound: nothing is.
        """
        return self._published(name)

    def build_directory(self, manifest: Manifest) -> Path:
        """Where the files of `manifest` lie."""
        return self._directory(manifest.name) / manifest.build

    def _directory(self, name: str) -> Path:
        return self.root / names.directory_name(name)

    def _converted(self, name: str) -> Path:
        return self.root / CONVERTED_DIRECTORY / names.directory_name(name)

    def _lock(self, name: str) -> ModelLock:
        return ModelLock(self.root / LOCKS_DIRECTORY, names.directory_name(name))

    def _scan(self) -> Iterator[Manifest | ShardError]:
        for directory in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            if directory.name.startswith(".") or not directory.is_dir():
                continue
            try:
                manifest = read_manifest(directory)
            except ShardError as error:
                yield error
            else:
                if manifest is not None:
                    yield manifest

    def _published(self, name: str) -> Manifest:
        manifest = read_manifest(self._directory(name))
        if manifest is None or manifest.name != name:
            raise self._not_found(name)
        return manifest

    def _is_published(self, name: str) -> bool:
        return (self._directory(name) / MANIFEST_FILE).is_file()

    def _not_found(self, name: str) -> ModelNotFound:
        stored = ", ".join(manifest.name for manifest in self.list()) or "no model"
        return ModelNotFound(f"{name} is not in the store {self.root}, which holds {stored}")

    def _wanted(self, model: str | Path, source: Path | None, dtype: str | None) -> WantedModel:
        if source is not None:
            return WantedModel(names.check_model_name(str(model)), Path(os.path.expanduser(source)), dtype)
        if isinstance(model, str) and names.is_model_name(model) and self._is_published(model):
            return WantedModel(model, None, dtype)
        path = Path(os.path.expanduser(model))
        if isinstance(model, Path) or (model and os.path.exists(path)):
            return WantedModel(names.name_from_path(path), path, dtype)
        return WantedModel(names.check_model_name(model), None, dtype)

    def _formed(self, wanted: WantedModel, form: StoredForm) -> WantedModel:
        """`wanted` in the form that is asked for, or that its own name says."""
        _, variant = names.split_variant(wanted.name)
        if form.is_packed:
            name, quant = packed_variant(wanted.name, form)
            return replace(wanted, name=name, form=form, quant=quant)
        if variant is None or self._is_published(wanted.name):
            return replace(wanted, form=form)
        return replace(wanted, form=form, quant=meaning_of(variant))

    def _local(self, wanted: WantedModel) -> WeightSource | None:
        """The checkpoint on this host that was named; None if none was, or only the model built from it is left."""
        origin = wanted.origin
        base, _ = names.split_variant(wanted.name)
        is_packed_of = wanted.quant is not None and wanted.dtype is None and self._is_published(base)
        if is_packed_of and (origin is None or self._published(base).source == str(origin.resolve())):
            return self._stored(base)
        if origin is None or not os.path.exists(origin):
            return None
        is_built = self._is_published(wanted.name) and self._published(wanted.name).source == str(origin.resolve())
        is_gone = is_built and origin.is_dir() and not has_weights(origin)
        return None if is_gone else open_source(origin, expand_to=wanted.dtype)

    def _stored(self, name: str) -> StoredCheckpoint:
        return StoredCheckpoint(self._open(manifest := self._published(name), silent), manifest)

    def _current(self, wanted: WantedModel, local: _Local | None) -> Manifest | None:
        """What is published if it is what is wanted; None if it has to be built."""
        if not self._is_published(wanted.name):
            return None
        manifest = self._published(wanted.name)
        if wanted.dtype is not None and wanted.dtype not in (manifest.requested_dtype, manifest.dtype):
            raise ModelError(
                f"{wanted.name} is in the store as {manifest.dtype}, not as {wanted.dtype}; leave the dtype out, "
                f"import it under another name, or remove it first: `lamella models remove {wanted.name}`"
            )
        if wanted.form.in_place and not manifest.is_in_place:
            raise ModelError(
                f"{wanted.name} is in the store already, with shards of its own; to read it in place remove it first: "
                f"`lamella models remove {wanted.name}`"
            )
        if local is None or local.fingerprint == manifest.fingerprint:
            return manifest
        if manifest.source != str(local.path.resolve()):
            raise ModelError(
                f"{wanted.name} is in the store already, built from {manifest.source}, which is not what is in "
                f"{local.path}; import it under another name, or remove it first: `lamella models remove {wanted.name}`"
            )
        logger.warning("%s has changed since %s was built from it: building again", local.path, wanted.name)
        return None

    def _build(
        self, wanted: WantedModel, local: _Local | None, offline: bool, hub_token: str | None, progress: Progress
    ) -> Manifest:
        if isinstance(local, PickledCheckpoint):
            return self._build_pickled(wanted, local, progress)
        base, variant = names.split_variant(wanted.name)
        absent = str(self._not_found(wanted.name))
        if local is None and wanted.origin is None and not wanted.form.in_place:
            asked = self._peers, peer_fetch.Wish(wanted.name, wanted.dtype), self._directory(wanted.name)
            manifest, refusals = peer_fetch.fetch_from_any(*asked, self._room_for(wanted.name), progress)
            if manifest is not None:
                return manifest
            absent += refusals
        if variant is not None and wanted.quant is None:
            what = f"What {variant!r} stands for is not known here"
            raise ModelNotFound(f"{absent}. {what}; build it with `lamella models pull {base} --quant ...`")
        if local is not None:
            kind = SourceKind.GGUF if isinstance(local, GgufCheckpoint) else SourceKind.DIRECTORY
            origin: tuple[SourceKind, str, str | None] = kind, str(local.path.resolve()), None
            if isinstance(local, StoredCheckpoint):
                origin = local.kind, local.location, local.revision
            request = BuildRequest(wanted.name, local, *origin, wanted.dtype, wanted.form.in_place)
        else:
            request = self._fetch(wanted, absent, offline, hub_token, progress)
        if wanted.quant is not None:
            device = resolve_device(wanted.form.quant_device)
            request = replace(request, quant=wanted.quant, quant_device=device)
        return self._built(request, progress)

    def _built(self, request: BuildRequest, progress: Progress) -> Manifest:
        """Build, with room made for it; a model of the store that it is built from stays meanwhile."""
        base, _ = names.split_variant(request.name)
        with using(self.root, base) if self._is_published(base) else contextlib.nullcontext():
            return shard_builder.build(request, self._directory(request.name), progress, self._room_for(request.name))

    def _room_for(self, name: str) -> Callable[[int], object]:
        """What makes room for the model `name`, for which neither it nor what it is packed from goes."""
        base, _ = names.split_variant(name)
        return lambda needed_bytes: self.room.make_room(needed_bytes, {name, base})

    def _build_pickled(self, wanted: WantedModel, pickled: PickledCheckpoint, progress: Progress) -> Manifest:
        place = self._converted(wanted.name)
        location = str(pickled.path.resolve())
        try:
            with pickled.converted(place, progress, expand_to=wanted.dtype) as source:
                request = BuildRequest(wanted.name, source, SourceKind.DIRECTORY, location, None, wanted.dtype)
                return self._built(request, progress)
        finally:
            with contextlib.suppress(OSError):
                place.parent.rmdir()  # stays while another model is converted in it

    def _fetch(
        self, wanted: WantedModel, absent: str, offline: bool, hub_token: str | None, progress: Progress
    ) -> BuildRequest:
        name = wanted.name
        if wanted.origin is not None:
            raise ModelNotFound(f"there is no checkpoint at {wanted.origin}, and the store holds none built from it")
        if offline:
            raise ModelNotFound(
                f"{absent}, and the hub is not asked (offline). Bring it in with "
                f"`lamella models pull {name}` or `lamella models import {name} PATH`."
            )
        return hub_source.request(name, wanted.dtype, hub_token, progress, wanted.form.in_place, absent)

    def _open(self, manifest: Manifest, progress: Progress) -> ShardedModel:
        directory = self.build_directory(manifest)
        check_files(manifest, directory, use_stamps=True, progress=progress)
        root, *layers = read_shards(manifest, directory)
        size_bytes = root.nbytes + sum(layer.nbytes for layer in layers)
        return ShardedModel(manifest.name, directory, manifest.dtype, root, tuple(layers), size_bytes)


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}, or None for the source's own")
