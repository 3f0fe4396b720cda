"""Reads and checks the header of a safetensors file, before anything else of the file is trusted.

Owns the format's rules (length, JSON, types, places); reads no tensor. Neighbours: `checkpoint` (source files) and
`shard_check` (our own shards).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import TypeGuard

from lamella_engine.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
METADATA_KEY = "__metadata__"
LENGTH_BYTES = 8  # before the header: its length

# Name in the file -> (torch name, bytes per element).
DTYPES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "F64": ("float64", 8),
        "F32": ("float32", 4),
        "F16": ("float16", 2),
        "BF16": ("bfloat16", 2),
        "F8_E4M3": ("float8_e4m3fn", 1),
        "F8_E5M2": ("float8_e5m2", 1),
        "F8_E8M0": ("float8_e8m0fnu", 1),
        "I64": ("int64", 8),
        "I32": ("int32", 4),
        "I16": ("int16", 2),
        "I8": ("int8", 1),
        "U64": ("uint64", 8),
        "U32": ("uint32", 4),
        "U16": ("uint16", 2),
        "U8": ("uint8", 1),
        "BOOL": ("bool", 1),
    }
)
FILE_DTYPES: Mapping[str, str] = MappingProxyType({torch_name: name for name, (torch_name, _) in DTYPES.items()})


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: torch dtype name, shape, and its bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """A checked header: its tensors are inside the file, lie one behind the other and have the sizes they claim.

    Attributes:
        path: the file.
        file_bytes: its size.
        data_start: where the data begins, in bytes from the file's start.
        tensors: by name, in the order of their data.
        sha256: of the header, in hex.
        metadata: texts that the file says of itself.
    """

    path: Path
    file_bytes: int
    data_start: int
    tensors: Mapping[str, TensorEntry]
    sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of `path`.

    Raises:
        CheckpointError: the file cannot be read, or its header is not one of a whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = header_length(path, file.read(LENGTH_BYTES))
            if LENGTH_BYTES + header_bytes > file_bytes:
                raise _corrupt(path, f"its header claims {header_bytes} bytes, the whole file has {file_bytes}")
            raw = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    parsed = _parse(path, raw, header_bytes)
    tensors = MappingProxyType(_tensors(path, parsed, LENGTH_BYTES + header_bytes, file_bytes))
    metadata = parsed.get(METADATA_KEY)
    texts = {key: text for key, text in metadata.items() if isinstance(text, str)} if isinstance(metadata, dict) else {}
    digest = hashlib.sha256(raw).hexdigest()
    return SafetensorsHeader(path, file_bytes, LENGTH_BYTES + header_bytes, tensors, digest, MappingProxyType(texts))


def header_length(path: PurePath, prefix: bytes) -> int:
    """Bytes of the header of `path`, from the bytes before it, `LENGTH_BYTES` of them.

    Raises:
        CheckpointError: the file is shorter, or a header cannot be as long.
    """
    if len(prefix) < LENGTH_BYTES:
        raise _corrupt(path, f"it has {len(prefix)} bytes, not even a header length")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise _corrupt(path, f"its header claims {header_bytes} bytes, more than the format's {MAX_HEADER_BYTES}")
    return header_bytes


def names_in_header(path: PurePath, raw: bytes, header_bytes: int) -> frozenset[str]:
    """Names of the tensors that the header `raw` of `path`, which should have `header_bytes`, describes.

    Raises:
        CheckpointError: it is no header, or cut off.
    """
    return frozenset(_parse(path, raw, header_bytes)) - {METADATA_KEY}


def _corrupt(path: PurePath, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file: {reason}. Fetch the file again.")


def _parse(path: PurePath, raw: bytes, header_bytes: int) -> dict[str, object]:
    if len(raw) != header_bytes:
        raise _corrupt(path, "it ends inside its header")
    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise _corrupt(path, "its header is not a JSON object")
    return parsed


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def _tensors(path: Path, parsed: dict[str, object], data_start: int, file_bytes: int) -> dict[str, TensorEntry]:
    entries = [_entry(path, name, value, data_start) for name, value in parsed.items() if name != METADATA_KEY]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    end = data_start
    for entry in entries:
        if entry.start != end:
            fault = "overlaps the one before it" if entry.start < end else "leaves a hole before it"
            raise _corrupt(path, f"tensor {entry.name!r} {fault}")
        end += entry.nbytes
    if end != file_bytes:
        fault = "it was cut off" if end > file_bytes else "it has bytes that belong to no tensor"
        raise _corrupt(path, f"its tensors end at byte {end}, the file at {file_bytes}: {fault}")
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise _corrupt(path, f"tensor {name!r} is not described by an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has type {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _corrupt(path, f"shape or data_offsets of tensor {name!r} are not lists of sizes")
    torch_name, element_bytes = DTYPES[dtype]
    start, stop = offsets
    if stop - start != math.prod(shape) * element_bytes:
        raise _corrupt(path, f"tensor {name!r} has {stop - start} bytes, its shape {shape} of {dtype} needs others")
    return TensorEntry(name, torch_name, tuple(shape), data_start + start, stop - start)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
