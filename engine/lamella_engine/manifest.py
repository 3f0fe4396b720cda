"""What the store remembers of a model: where it came from and each shard's size, hash and tensors.

``manifest.json`` is written last, so a directory without it is not a model. ``verified.json`` remembers which files
were hashed in full, and is only ever a reason to hash less.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lamella_engine.errors import ShardError
from lamella_engine.shard import Shard, TensorSpec

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
VERIFIED_FILE = "verified.json"
_HASH_CHUNK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class ShardRecord:
    """One shard file of a model: `nbytes` of data from `data_start` on, and the sha256 of the whole file."""

    file: str
    data_start: int
    nbytes: int
    sha256: str
    tensors: tuple[TensorSpec, ...]

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.data_start + self.nbytes

    def shard(self, directory: Path) -> Shard:
        """The shard as the reader wants it."""
        return Shard(directory / self.file, self.data_start, self.nbytes, self.tensors)


@dataclass(frozen=True)
class Manifest:
    """A built model.

    Attributes:
        name: the model's name in the store.
        revision: the commit it was fetched at, or None for a local source.
        source_kind, source, source_hash: ``safetensors`` or ``gguf``, where it was, and its fingerprint.
        dtype: torch dtype name of most weights.
        family: transformers' model type.
        root, layers: the shards.
    """

    name: str
    revision: str | None
    source_kind: str
    source: str
    source_hash: str
    dtype: str
    family: str
    root: ShardRecord
    layers: tuple[ShardRecord, ...]
    format_version: int = FORMAT_VERSION

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards' data."""
        return sum(record.nbytes for record in self.shards)

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """All shards, the root first."""
        return (self.root, *self.layers)


def write_json(path: Path, value: object) -> None:
    """Replace `path` by `value` as JSON in one step that survives a crash."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Publish the model in `directory`."""
    write_json(directory / MANIFEST_FILE, asdict(manifest))


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest in `directory`, or None if no model is published there.

    Raises:
        ShardError: the manifest is damaged or of another format version.
    """
    path = directory / MANIFEST_FILE
    try:
        raw: Any = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} is damaged: {error}. Remove {directory} and build the model again.") from error
    try:
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise ShardError(
                f"{path} has shard format {version}, this version reads {FORMAT_VERSION}. "
                f"Remove {directory} and build the model again."
            )
        records = [record_from_json(item) for item in (raw["root"], *raw["layers"])]
        return Manifest(**{**raw, "root": records[0], "layers": tuple(records[1:])})
    except (KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged. Remove {directory} and build the model again.") from error


def record_from_json(raw: Any) -> ShardRecord:
    """A shard record from its JSON form."""
    tensors = tuple(TensorSpec(**{**item, "shape": tuple(item["shape"])}) for item in raw["tensors"])
    return ShardRecord(**{**raw, "tensors": tensors})


def check_shards(directory: Path, records: Iterable[ShardRecord], *, always_hash: bool = False) -> None:
    """Check that every shard file is whole and unaltered.

    Files whose inode, size and times are those of their last full check are not hashed again, unless `always_hash`.

    Raises:
        ShardError: a file is missing, truncated or altered; names it and the fix.
    """
    verified = _read_verified(directory)
    fresh: dict[str, list[int]] = {}
    for record in records:
        stamp = _stamp(directory, record)
        if always_hash or verified.get(record.file) != stamp:
            _check_hash(directory, record)
            stamp = _stamp(directory, record)
        fresh[record.file] = stamp
    if fresh != verified:
        remember_verified(directory, fresh)


def remember_verified(directory: Path, stamps: dict[str, list[int]]) -> None:
    """Remember the stamps of files whose hash is known to be right; a read-only store is left as it is."""
    if os.access(directory, os.W_OK):
        write_json(directory / VERIFIED_FILE, stamps)


def stamp_of(directory: Path, record: ShardRecord) -> list[int]:
    """What changes when a file is written to or replaced: inode, size, modification and change time (ns)."""
    status = os.stat(directory / record.file)
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _stamp(directory: Path, record: ShardRecord) -> list[int]:
    path = directory / record.file
    try:
        stamp = stamp_of(directory, record)
    except OSError as error:
        raise _broken(path, f"it cannot be read: {error.strerror}") from error
    if stamp[1] != record.file_bytes:
        raise _broken(path, f"it has {stamp[1]} bytes instead of {record.file_bytes}")
    return stamp


def _check_hash(directory: Path, record: ShardRecord) -> None:
    path = directory / record.file
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise _broken(path, f"it cannot be read: {error.strerror}") from error
    if digest.hexdigest() != record.sha256:
        raise _broken(path, "its contents changed since it was built (sha256 differs)")


def _read_verified(directory: Path) -> dict[str, list[int]]:
    try:
        raw: Any = json.loads((directory / VERIFIED_FILE).read_text())
    except (OSError, ValueError):
        return {}  # only costs hashing again
    return raw if isinstance(raw, dict) else {}


def _broken(path: Path, reason: str) -> ShardError:
    return ShardError(
        f"the shard {path} is broken: {reason}. Remove the model (`lamella models remove NAME`) and build it again."
    )
