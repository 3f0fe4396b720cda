"""Deletes the weight files that a model's shards were built from, where nothing is lost by it.

Owns which files those are and when they stay: another checkpoint than was built from, one that holds more than the
shards do, files elsewhere. The caller holds the model's lock and has checked every shard by its checksum. Neighbours:
`shard_store` before it; `checkpoint`, `gguf_checkpoint` and `hub` know the files.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from lamella_engine import architecture, convert, hub
from lamella_engine.checkpoint import DirectoryCheckpoint
from lamella_engine.errors import ModelError
from lamella_engine.gguf_checkpoint import GgufCheckpoint
from lamella_engine.manifest import Manifest
from lamella_engine.weight_files import has_weights
from lamella_engine.weight_source import SourceKind, WeightSource

logger = logging.getLogger(__name__)

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True)
class Deleted:
    """What `delete` did: the files that are gone, their bytes, and files that stay because they lie elsewhere."""

    files: tuple[Path, ...]
    nbytes: int
    kept: tuple[Path, ...]


def delete(manifest: Manifest, named: Path | None, store_root: Path) -> Deleted:
    """Delete the weight files of what `manifest` was built from; see `ShardStore.delete_original`.

    Raises:
        ModelError: it changed since, or holds more than the shards do.
    """
    if manifest.originals:
        raise ModelError(
            f"{manifest.name} reads {len(manifest.originals)} files of its original in place: there is no second "
            "copy to be deleted, so nothing was. For shards of its own, remove it and build it without --in-place."
        )
    if manifest.quant:
        raise ModelError(
            f"{manifest.name} is packed ({manifest.quant}) and does not hold all that its original does, so that stays"
        )
    original = _original(manifest, named)
    if original is None:
        return Deleted((), 0, ())
    if original.resolve().is_relative_to(store_root.resolve()):
        raise ModelError(f"{original} lies in the store {store_root}; remove models with `lamella models remove`")
    source: WeightSource = DirectoryCheckpoint.open(original) if original.is_dir() else GgufCheckpoint.open(original)
    if source.fingerprint != manifest.fingerprint:
        raise ModelError(
            f"{original} is not what {manifest.name} was built from, or was written again since; nothing was deleted"
        )
    if manifest.source_kind != SourceKind.HUB.value:
        _check_nothing_is_lost(source, manifest)
    return _delete(source.weight_files)


def _original(manifest: Manifest, named: Path | None) -> Path | None:
    """The directory or file with the original's weights, if it is still there and may be deleted."""
    if manifest.source_kind == SourceKind.HUB.value:
        place = hub.cached_snapshot(manifest.source.removeprefix("hub:"), manifest.revision or "")
    else:
        place = Path(manifest.source)
        if named is None or named.expanduser().resolve() != place:
            logger.warning("%s was built from %s, which was not named: it stays", manifest.name, place)
            return None
    if place is None or not place.exists() or (place.is_dir() and not has_weights(place)):
        return None
    return place


def _check_nothing_is_lost(source: WeightSource, manifest: Manifest) -> None:
    built = architecture.build(source.load_config(), torch.float32)
    conversions = source.conversions(built)
    left_out = convert.left_out(built, conversions)
    if left_out:
        raise ModelError(
            f"{source.path} holds {len(left_out)} tensors that the shards of {manifest.name} do not, such as "
            f"{left_out[0]!r}: deleting it would lose them, so it stays"
        )
    stored = manifest.requested_dtype
    wider = [
        target.name
        for conversion in conversions
        for target in conversion.targets
        if stored is not None and target.dtype in _FLOATS and not _holds(stored, target.dtype)
    ]
    if wider:
        raise ModelError(
            f"{source.path} holds tensors that the shards of {manifest.name} keep as {stored} only, such as "
            f"{wider[0]!r}: deleting it would lose digits, so it stays. Import it without --dtype to store all of them"
        )


def _holds(stored: str, own: str) -> bool:
    """True if every number of the type `own` is one of the type `stored`."""
    return stored == own or (stored == "float32" and own in ("float16", "bfloat16"))


def _delete(files: tuple[Path, ...]) -> Deleted:
    deleted: list[Path] = []
    kept: list[Path] = []
    nbytes = 0
    for file in files:
        blob = file.resolve() if file.is_symlink() else None
        if blob is not None and not _is_in_cache_of(file, blob):
            kept.append(file)
            continue
        try:
            size = file.stat().st_size
            file.unlink()
            is_freed = blob is None or _delete_blob(file, blob)
        except OSError as error:
            raise ModelError(
                f"cannot delete {error.filename}: {error.strerror or error}. The shards are whole; {len(deleted)} "
                "files were deleted before"
            ) from error
        nbytes += size if is_freed else 0
        deleted.append(file)
    if kept:
        logger.warning("%d links to files elsewhere stay, such as %s", len(kept), kept[0])
    return Deleted(tuple(deleted), nbytes, tuple(kept))


def _is_in_cache_of(link: Path, blob: Path) -> bool:
    """True for ``<repository>/snapshots/<commit>/<file>`` that leads to ``<repository>/blobs/<digest>``."""
    snapshots = link.parent.resolve().parent
    return snapshots.name == "snapshots" and blob.parent == snapshots.parent / "blobs"


def _delete_blob(link: Path, blob: Path) -> bool:
    """Delete `blob` unless another commit of the repository uses it."""
    snapshots = link.parent.resolve().parent
    if any(other.is_symlink() and other.resolve() == blob for other in snapshots.rglob("*")):
        return False
    blob.unlink()
    return True
