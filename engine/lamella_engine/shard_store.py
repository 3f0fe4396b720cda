"""The store of built models: a directory shared by all workers of a host, in which each model is built once.

One directory per model, one lock per model (in ``.locks``). What is published in it is only ever read; what a crashed
build left behind is taken up or cleaned away by the next one.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from lamella_engine import architecture, hub, shard_builder
from lamella_engine.checkpoint import Checkpoint, fingerprint, open_checkpoint
from lamella_engine.errors import ModelError, ModelNameError, ModelNotFound
from lamella_engine.manifest import Manifest, check_shards, read_manifest
from lamella_engine.names import check_model_name, model_directory, name_for_path
from lamella_engine.progress import Progress
from lamella_engine.shard import ShardedModel
from lamella_engine.shard_builder import Origin

logger = logging.getLogger(__name__)

BUILD_DEADLINE_S = 6 * 3600.0  # a 140 GB model from a slow disk takes hours
REMOVE_DEADLINE_S = 10.0
_REMIND_S = 15.0  # how often a waiting process says whom it waits for
_LOCKS = ".locks"


def default_store_root() -> Path:
    """The store that is used where none is named: ``LAMELLA_STORE``, else ``~/.cache/lamella/shards``."""
    return Path(os.environ.get("LAMELLA_STORE") or "~/.cache/lamella/shards").expanduser()


class ShardStore:
    """The models under one directory; safe to use from many processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser()

    def open(self, name: str) -> ShardedModel:
        """Open a built model, checking every shard (in full where it changed since it was last checked).

        Raises:
            ModelNotFound: the store does not have it.
            ShardError: a shard is missing, truncated or altered.
        """
        directory = model_directory(self.root, name)
        manifest = read_manifest(directory)
        if manifest is None:
            raise ModelNotFound(f"the store {self.root} has no model {name!r}; it has {self._names()}")
        check_shards(directory, manifest.shards)
        return _sharded(directory, manifest)

    def ensure(
        self,
        model: str | Path,
        *,
        source: Path | None = None,
        dtype: str | None = None,
        offline: bool = False,
        hub_token: str | None = None,
        progress: Progress | None = None,
    ) -> ShardedModel:
        """Open `model`, building it first if the store does not have it.

        Args:
            model: a name in the store or on the hub, or the path of a checkpoint directory or ``.gguf`` file.
            source: where to build the name `model` from.
            dtype: torch dtype name to store the weights in; None keeps the source's.
            offline: never ask the hub.
            hub_token: hub access token; None means the usual places.
            progress: told how far fetching and building are.

        Raises:
            ModelError: the model cannot be had, cannot run, or is in the store from another source.
        """
        path = source or self._as_path(model)
        if path is not None:
            checkpoint = open_checkpoint(path)
            found = fingerprint(checkpoint)
            name = name_for_path(path, found) if source is None else check_model_name(str(model))
            return self._build_from(name, checkpoint, Origin(name, str(path.resolve()), None), dtype, progress)
        name = check_model_name(str(model))
        if self.has(name):
            return self._open_as(name, dtype)
        if offline:
            raise ModelNotFound(f"the store {self.root} has no model {name!r} and the hub may not be asked (offline)")
        return self._build_from_hub(name, dtype, hub_token, progress)

    def has(self, name: str) -> bool:
        """True if the model is published in the store."""
        return read_manifest(model_directory(self.root, name)) is not None

    def list(self) -> tuple[Manifest, ...]:
        """The manifests of all built models, by name."""
        if not self.root.is_dir():
            return ()
        found = [read_manifest(path) for path in self.root.iterdir() if path.is_dir() and path.name != _LOCKS]
        return tuple(sorted((item for item in found if item is not None), key=lambda item: item.name))

    def manifest(self, name: str) -> Manifest:
        """The manifest of a built model, without checking its shards.

        Raises:
            ModelNotFound: the store does not have it.
        """
        manifest = read_manifest(model_directory(self.root, name))
        if manifest is None:
            raise ModelNotFound(f"the store {self.root} has no model {name!r}; it has {self._names()}")
        return manifest

    def verify(self, name: str) -> None:
        """Hash every shard of a model.

        Raises:
            ModelNotFound: the store does not have it.
            ShardError: a shard is missing, truncated or altered.
        """
        check_shards(model_directory(self.root, name), self.manifest(name).shards, always_hash=True)

    def remove(self, name: str) -> None:
        """Delete a model. Engines that have it open keep running on the files they hold.

        Raises:
            ModelNotFound: there is nothing of that name, not even a cut-off build.
            ModelError: it is being built.
        """
        directory = model_directory(self.root, name)
        if not directory.is_dir():
            raise ModelNotFound(f"the store {self.root} has no model {name!r}; it has {self._names()}")
        with self._lock(name, REMOVE_DEADLINE_S):
            (directory / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(directory)

    def _build_from_hub(
        self, name: str, dtype: str | None, token: str | None, progress: Progress | None
    ) -> ShardedModel:
        with self._lock(name, BUILD_DEADLINE_S):
            if self.has(name):  # another process built it meanwhile
                return self._open_as(name, dtype)
            config = architecture.load_config(hub.fetch_config(name, token=token).directory)
            architecture.build(config, torch.float32)  # refuses what cannot run before the weights are fetched
            snapshot = hub.download(name, token=token, progress=progress)
            checkpoint = open_checkpoint(snapshot.directory)
            origin = Origin(name, f"hub:{name}", snapshot.revision)
            directory = model_directory(self.root, name)
            return _sharded(directory, shard_builder.build(directory, checkpoint, origin, dtype, progress))

    def _build_from(
        self, name: str, checkpoint: Checkpoint, origin: Origin, dtype: str | None, progress: Progress | None
    ) -> ShardedModel:
        with self._lock(name, BUILD_DEADLINE_S):
            if self.has(name):
                if self.manifest(name).source_hash != fingerprint(checkpoint):
                    raise ModelError(
                        f"the store has {name!r} from other files than {origin.source} now holds. "
                        f"Remove it first (`lamella models remove {name}`) or choose another name."
                    )
                return self._open_as(name, dtype)
            directory = model_directory(self.root, name)
            return _sharded(directory, shard_builder.build(directory, checkpoint, origin, dtype, progress))

    def _open_as(self, name: str, dtype: str | None) -> ShardedModel:
        sharded = self.open(name)
        if dtype is not None and dtype != sharded.dtype:
            raise ModelError(
                f"the store has {name!r} in {sharded.dtype}, not {dtype}. Remove it first "
                f"(`lamella models remove {name}`), or build it under another name."
            )
        return sharded

    def _as_path(self, model: str | Path) -> Path | None:
        """The checkpoint path that `model` means, or None if it is a name."""
        if isinstance(model, Path):
            return model.expanduser()
        path = Path(model).expanduser()
        try:
            if self.has(model):
                return None
        except ModelNameError:
            return path if path.exists() or _looks_like_path(model) else None
        return path if path.is_dir() or (path.is_file() and path.suffix == ".gguf") else None

    @contextmanager
    def _lock(self, name: str, deadline_s: float) -> Iterator[None]:
        """Hold the model's lock; while it is someone else's, say whose."""
        directory = model_directory(self.root, name)
        locks = self.root / _LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{directory.name}.lock")
        owner = locks / f"{directory.name}.owner"
        deadline = time.monotonic() + deadline_s
        while True:
            try:
                lock.acquire(timeout=min(_REMIND_S, max(0.0, deadline - time.monotonic())))
                break
            except Timeout:
                who = owner.read_text() if owner.exists() else "another process"
                if time.monotonic() >= deadline:
                    raise ModelError(f"{name!r} is still being built by {who} after {deadline_s:.0f} s") from None
                logger.info("waiting for %s, which is building %s", who, name)
        try:
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def _names(self) -> str:
        return ", ".join(manifest.name for manifest in self.list()) or "none"


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text.endswith(".gguf")


def _sharded(directory: Path, manifest: Manifest) -> ShardedModel:
    return ShardedModel(
        name=manifest.name,
        directory=directory,
        dtype=manifest.dtype,
        root=manifest.root.shard(directory),
        layers=tuple(record.shard(directory) for record in manifest.layers),
        size_bytes=manifest.size_bytes,
    )
