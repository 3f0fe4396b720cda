"""Checks the files of a published model: always their sizes, and their SHA-256 unless nothing touched them since.

Hashing 100 GB at every start is too slow, so a full check leaves a stamp per file (inode, size, times). A file whose
stamp still fits is not hashed again. A stamp is only left if the file was old enough when it was taken: a change
within the same tick of the file system's clock would not show in its times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from lamella_engine import in_place
from lamella_engine.errors import CheckpointError, ShardError
from lamella_engine.manifest import Manifest, damaged, write_json
from lamella_engine.packed_shard import tensors_of
from lamella_engine.progress import CHECK, Progress, silent
from lamella_engine.safetensors_header import read_header
from lamella_engine.shard import DATA_ALIGNMENT, TENSOR_ALIGNMENT, Shard, TensorSpec
from lamella_engine.shard_writer import HASH_CHUNK_BYTES, PADDING_PREFIX, ShardRecord

logger = logging.getLogger(__name__)

STAMPS_FILE = "checked.json"
CLOCK_TICK_NS = 100_000_000  # file times may lag this far behind the clock

Stamps = dict[str, list[int]]


def check_files(manifest: Manifest, directory: Path, *, use_stamps: bool, progress: Progress) -> None:
    """Check every file of `manifest` in its build `directory`.

    Args:
        manifest: what must be there.
        directory: where.
        use_stamps: trust files that have not changed since they were hashed; otherwise hash all.
        progress: told about hashing only.

    Raises:
        ShardError: a file is missing, truncated or altered; all such files are named.
    """
    stamps = _read_stamps(directory) if use_stamps else {}
    faults, pending = [], []
    for record in manifest.files:
        path = directory / record.file
        fault = _size_fault(path, record)
        if fault:
            faults.append((path, fault))
        elif stamps.get(record.file) != _stamp(path):
            pending.append(record)
    if not faults and pending:
        fresh, faults = _hash_all(directory, pending, progress)
        if not faults:
            kept = {record.file for record in manifest.files} - {record.file for record in pending}
            write_stamps(directory, {file: stamps[file] for file in kept} | fresh)
    if faults:
        others = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
        raise damaged(faults[0][0], faults[0][1] + others, manifest.name)


def damaged_files(manifest: Manifest, directory: Path) -> list[Path]:
    """The files of `manifest` that are in its build `directory` and are not what was built; all are hashed."""
    there = [record for record in manifest.files if (directory / record.file).is_file()]
    wrong_size = [record for record in there if _size_fault(directory / record.file, record)]
    _, altered = _hash_all(directory, [record for record in there if record not in wrong_size], silent)
    return [*(directory / record.file for record in wrong_size), *(path for path, _ in altered)]


def read_shards(manifest: Manifest, directory: Path) -> tuple[Shard, ...]:
    """Read where the tensors of each shard of `manifest` lie in its build `directory`: the root, then the layers.

    Raises:
        ShardError: a file is not a shard of this format.
    """
    originals = {record.file: record.sha256 for record in manifest.originals}
    return tuple(
        _read_placed(directory / record.file, manifest.name, originals)
        if record.file.endswith(in_place.SUFFIX)
        else read_shard_layout(directory / record.file, manifest.name, record.sha256)
        for record in manifest.shards
    )


def _read_placed(path: Path, name: str, originals: dict[str, str]) -> Shard:
    try:
        return in_place.read_layer(path, originals)
    except ShardError as error:
        raise damaged(path, str(error), name) from error


def read_shard_layout(path: Path, name: str, digest: str = "") -> Shard:
    """Read where the tensors of the shard `path` (of the model `name`, recorded SHA-256 `digest`) lie.

    Raises:
        ShardError: the file is not a shard of this format.
    """
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise damaged(path, str(error), name) from error
    plain = {
        entry.name: TensorSpec(entry.name, entry.dtype, entry.shape, entry.start - header.data_start, entry.nbytes)
        for entry in header.tensors.values()
        if not entry.name.startswith(PADDING_PREFIX)
    }
    if header.data_start % DATA_ALIGNMENT or any(spec.offset % TENSOR_ALIGNMENT for spec in plain.values()):
        raise damaged(path, "its tensors do not lie where they should", name)
    try:
        specs = tensors_of(header, plain)
    except ShardError as error:
        raise damaged(path, str(error), name) from error
    return Shard(path, header.data_start, header.file_bytes - header.data_start, specs, digest)


def hash_file(path: Path) -> str:
    """SHA-256 of the file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(directory: Path, names: list[str], progress: Progress) -> tuple[ShardRecord, ...]:
    """Hash files of any size, and say what they are.

    Raises:
        ShardError: one of them cannot be read.
    """
    total = sum((directory / name).stat().st_size for name in names)
    done = 0
    records = []
    for name in names:
        digest, nbytes = hashlib.sha256(), 0
        for chunk in _chunks(directory / name):
            digest.update(chunk)
            nbytes += len(chunk)
            progress(CHECK, done + nbytes, max(total, done + nbytes))
        done += nbytes
        records.append(ShardRecord(name, nbytes, digest.hexdigest()))
    return tuple(records)


def write_stamps(directory: Path, stamps: Stamps) -> None:
    """Remember which files were hashed; a store that cannot be written to is checked again next time."""
    try:
        write_json(directory / STAMPS_FILE, stamps)
    except OSError as error:
        logger.info("cannot write %s (%s): the shards will be hashed again", directory / STAMPS_FILE, error)


def stamp_unless_recent(path: Path) -> list[int] | None:
    """The stamp of a file that nothing changes now, or None if it is too young for its times to be trusted."""
    now_ns = time.time_ns()
    stamp = _stamp(path)
    return stamp if now_ns - max(stamp[2], stamp[3]) > CLOCK_TICK_NS else None


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_stamps(directory: Path) -> Stamps:
    with contextlib.suppress(OSError, ValueError):
        parsed = json.loads((directory / STAMPS_FILE).read_text(encoding="utf-8"))
        if isinstance(parsed, dict):
            return parsed
    return {}


def _size_fault(path: Path, record: ShardRecord) -> str | None:
    try:
        nbytes = path.stat().st_size
    except OSError as error:
        return f"it cannot be found ({error.strerror})"
    if nbytes != record.nbytes:
        return f"it has {nbytes} bytes where {record.nbytes} were built"
    return None


def _hash_all(directory: Path, records: list[ShardRecord], progress: Progress) -> tuple[Stamps, list[tuple[Path, str]]]:
    total = sum(record.nbytes for record in records)
    done = 0
    stamps: Stamps = {}
    faults: list[tuple[Path, str]] = []
    progress(CHECK, 0, total)
    for record in records:
        path = directory / record.file
        before = stamp_unless_recent(path)
        digest = hashlib.sha256()
        for chunk in _chunks(path):
            digest.update(chunk)
            done += len(chunk)
            progress(CHECK, min(done, total), total)
        if digest.hexdigest() != record.sha256:
            faults.append((path, "its contents are not those that were built (SHA-256 differs)"))
        elif before is not None and before == _stamp(path):
            stamps[record.file] = before
    return stamps, faults


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror or error}") from error
