"""Writes one shard: an ordinary safetensors file laid out so that it can be read straight into a slot.

Owns the layout (header padded so that the data starts on 4096 bytes, every tensor on 64) and the order of write, sync
and rename that leaves either a whole shard or none. Neighbours: `convert` before it, `shard_builder` around it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from lamella_engine.errors import CheckpointError, DiskFull, ShardError
from lamella_engine.safetensors_header import DTYPES, FILE_DTYPES, METADATA_KEY
from lamella_engine.shard import DATA_ALIGNMENT, TENSOR_ALIGNMENT
from lamella_engine.weight_source import Conversion, TensorShape

PADDING_PREFIX = "__pad__."
PART_SUFFIX = ".part"
HASH_CHUNK_BYTES = 1 << 22
_OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ShardLayout:
    """Where everything of a shard goes, known before a byte is written.

    Attributes:
        header: the file up to its data, a multiple of 4096 bytes.
        places: by tensor name, (offset in the data, shape).
        file_bytes: size of the whole file.
    """

    header: bytes
    places: dict[str, tuple[int, TensorShape]]
    file_bytes: int


@dataclass(frozen=True)
class ShardRecord:
    """A shard that is on disk: file name, size in bytes, SHA-256 in hex."""

    file: str
    nbytes: int
    sha256: str


def lay_out(
    tensors: Iterable[TensorShape], metadata: Mapping[str, str] = MappingProxyType({}), *, keeps_order: bool = False
) -> ShardLayout:
    """Place `tensors` one behind the other; the format allows no holes, so padding is made of small tensors.

    Tensors whose size is a multiple of 64 come first and need none, unless the order given is kept. `metadata` is what
    the file says of itself.
    """
    ordered = list(tensors)
    if not keeps_order:
        ordered.sort(key=lambda tensor: size_of(tensor) % TENSOR_ALIGNMENT != 0)
    entries: dict[str, object] = {METADATA_KEY: {"format": "pt", **metadata}}
    places: dict[str, tuple[int, TensorShape]] = {}
    offset = 0
    for tensor in ordered:
        if padding := -offset % TENSOR_ALIGNMENT:
            name = f"{PADDING_PREFIX}{len(entries)}"
            entries[name] = {"dtype": "U8", "shape": [padding], "data_offsets": [offset, offset + padding]}
            offset += padding
        end = offset + size_of(tensor)
        dtype = FILE_DTYPES[tensor.dtype]
        entries[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        places[tensor.name] = (offset, tensor)
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return ShardLayout(len(text).to_bytes(8, "little") + text, places, 8 + len(text) + offset)


def size_of(tensor: TensorShape) -> int:
    """Bytes of the tensor's data."""
    return math.prod(tensor.shape) * DTYPES[FILE_DTYPES[tensor.dtype]][1]


def write_shard(
    path: Path,
    layout: ShardLayout,
    conversions: Iterable[Conversion],
    rename: Callable[[str], str],
    advance: Callable[[int], None],
) -> ShardRecord:
    """Run `conversions` and write their results to `path`, which appears whole or not at all.

    Args:
        path: the shard; a temporary file lies beside it meanwhile.
        layout: from the same tensors.
        conversions: run one after the other; only one's results are in memory.
        rename: from native names to names in the shard.
        advance: called with the bytes of each tensor written.

    Raises:
        DiskFull: the room that was there at the start is gone.
        CheckpointError: a conversion made something else than was planned.
    """
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with part.open("w+b", buffering=0) as file:
            _reserve(file.fileno(), layout.file_bytes)
            _write_all(file.fileno(), layout.header, 0)
            for conversion in conversions:
                _write_results(file.fileno(), layout, conversion, rename, advance)
            os.fsync(file.fileno())
            digest = _digest(file.fileno())
        part.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise as_model_error(error, path, layout.file_bytes) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return ShardRecord(path.name, layout.file_bytes, digest)


def write_bytes(path: Path, data: bytes) -> ShardRecord:
    """Write a small file that stands for a shard; `path` appears whole or not at all.

    Raises:
        DiskFull: there is no room.
    """
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise as_model_error(error, path, len(data)) from error
    return ShardRecord(path.name, len(data), hashlib.sha256(data).hexdigest())


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_model_error(error: OSError, path: Path, needed_bytes: int) -> ShardError | DiskFull:
    """What an error of the file system, met while `path` was written, means to the user."""
    if error.errno not in _OUT_OF_ROOM:
        return ShardError(f"cannot write {path}: {error.strerror or error}. Check the store's file system and rights.")
    stat = os.statvfs(path.parent)
    free_bytes = stat.f_bavail * stat.f_frsize
    return DiskFull(
        f"the disk filled up while {path.name} was written ({error.strerror}): it needs {needed_bytes:,} bytes and "
        f"{free_bytes:,} are free in {path.parent}. Free some space and start again; finished shards are kept.",
        needed_bytes,
        free_bytes,
    )


def _reserve(descriptor: int, file_bytes: int) -> None:
    """Take the room at once, so that a full disk shows before the conversion's work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, file_bytes)
    else:
        os.ftruncate(descriptor, file_bytes)


def _write_results(
    descriptor: int,
    layout: ShardLayout,
    conversion: Conversion,
    rename: Callable[[str], str],
    advance: Callable[[int], None],
) -> None:
    planned = {target.name for target in conversion.targets}
    results = dict(conversion.run())
    if results.keys() != planned:
        raise CheckpointError(f"{', '.join(conversion.sources[:3])} made {sorted(results)}, not {sorted(planned)}")
    for name in sorted(planned):
        value = results.pop(name)
        offset, tensor = layout.places[rename(name)]
        if tuple(value.shape) != tensor.shape or str(value.dtype).removeprefix("torch.") != tensor.dtype:
            raise CheckpointError(
                f"tensor {name!r} came out as {value.dtype} {list(value.shape)}; {tensor.dtype} {list(tensor.shape)} "
                "was planned"
            )
        data = value.contiguous().reshape(-1).view(torch.uint8)
        _write_all(descriptor, memoryview(data.numpy()), len(layout.header) + offset)  # type: ignore[arg-type] # buffer
        advance(data.numel())


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view[:HASH_CHUNK_BYTES], offset)
        view, offset = view[count:], offset + count


def _digest(descriptor: int) -> str:
    digest = hashlib.sha256()
    offset = 0
    while chunk := os.pread(descriptor, HASH_CHUNK_BYTES, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
