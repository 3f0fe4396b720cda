"""Safetensors headers, read with suspicion: nothing is trusted before it is checked against the file's size.

Format: 8 bytes little-endian header length, the header as JSON, then the data. Source of the rules: the safetensors
format description.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lamella_engine.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: torch dtype name, shape, and its bytes as [begin, end) from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


@dataclass(frozen=True)
class SafetensorsHeader:
    """The tensors of one file by name; `data_start` is where its data begin."""

    path: Path
    data_start: int
    entries: Mapping[str, TensorEntry]


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated, or its header does not fit it; names the file and the reason.
    """
    try:
        file_bytes = os.stat(path).st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise _corrupt(path, f"its header would be {length} bytes in a file of {file_bytes}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        listed = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "its header is not JSON") from error
    if not isinstance(listed, dict):
        raise _corrupt(path, "its header is not a JSON object")
    data_start = 8 + length
    entries = {
        name: _entry(path, name, value, data_start, file_bytes)
        for name, value in listed.items()
        if name != "__metadata__"
    }
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise _corrupt(path, f"tensor {name!r} begins at byte {entry.begin} where {end} was expected")
        end = entry.end
    if end != file_bytes:
        raise _corrupt(path, f"its tensors end at byte {end}, the file at {file_bytes}; it is truncated or padded")
    return SafetensorsHeader(path, data_start, entries)


def _entry(path: Path, name: str, value: object, data_start: int, file_bytes: int) -> TensorEntry:
    try:
        assert isinstance(value, dict), "caught below"
        dtype, shape, (begin, end) = TORCH_NAMES.get(value["dtype"]), value["shape"], value["data_offsets"]
        is_sound = all(type(number) is int and number >= 0 for number in (begin, end, *shape))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, f"the entry of tensor {name!r} is malformed") from error
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name!r} has the type {value['dtype']!r}, which is not supported")
    if not is_sound or begin > end or data_start + end > file_bytes:
        raise _corrupt(path, f"tensor {name!r} lies outside the file")
    if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise _corrupt(path, f"tensor {name!r} of shape {shape} and type {dtype} cannot have {end - begin} bytes")
    return TensorEntry(dtype, tuple(shape), data_start + begin, data_start + end)


def _corrupt(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a sound safetensors file: {reason}. Fetch it again.")
