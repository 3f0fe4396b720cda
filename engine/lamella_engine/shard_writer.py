"""Writes one shard: an ordinary safetensors file laid out so that it can be read straight into a slot.

The header is padded with spaces so that the data start on 4096 bytes; every tensor starts on 64. Safetensors allows no
holes between tensors, so the gaps are tensors of their own (``__pad__.N``, uint8), which readers of ours leave out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lamella_engine.errors import DiskFull
from lamella_engine.safetensors_header import ITEM_BYTES, SAFETENSORS_NAMES
from lamella_engine.shard import DATA_ALIGNMENT, TENSOR_ALIGNMENT, TensorSpec

PAD_PREFIX = "__pad__."


@dataclass(frozen=True)
class WrittenShard:
    """What was written: `nbytes` of data from `data_start` on, and the sha256 of the whole file."""

    data_start: int
    nbytes: int
    sha256: str
    tensors: tuple[TensorSpec, ...]


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[tuple[TensorSpec, ...], int]:
    """Places for `tensors` (name -> torch dtype name, shape) in order, and the bytes of all data."""
    specs, offset = [], 0
    for name, (dtype, shape) in tensors.items():
        offset = -(-offset // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        nbytes = ITEM_BYTES[dtype]
        for size in shape:
            nbytes *= size
        specs.append(TensorSpec(name, dtype, shape, offset, nbytes))
        offset += nbytes
    return tuple(specs), offset


def file_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of the whole file that `write_shard` makes of `tensors`."""
    specs, nbytes = layout(tensors)
    return len(_header(specs, nbytes)) + nbytes


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> WrittenShard:
    """Write `tensors` to `path` (through a temporary file, flushed to the disk, then renamed).

    Raises:
        DiskFull: the disk filled up; nothing is left behind.
    """
    specs, nbytes = layout({name: (_dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()})
    header = _header(specs, nbytes)
    digest = hashlib.sha256()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            written = 0
            for piece in (header, *_pieces(specs, tensors)):
                file.write(piece)
                digest.update(piece)
                written += len(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
            needed = len(header) + nbytes
            raise DiskFull(
                f"the disk under {path.parent} is full: {path.name} needs {needed:,} bytes, {free:,} are free. "
                "Make room and start again; finished shards are kept.",
                needed,
                free,
            ) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    assert written == len(header) + nbytes, "the layout and the tensors agree"
    return WrittenShard(len(header), nbytes, digest.hexdigest(), specs)


def _pieces(specs: tuple[TensorSpec, ...], tensors: Mapping[str, torch.Tensor]) -> list[memoryview | bytes]:
    pieces: list[memoryview | bytes] = []
    end = 0
    for spec in specs:
        if spec.offset > end:
            pieces.append(bytes(spec.offset - end))
        flat = tensors[spec.name].detach().contiguous().reshape(-1)
        if flat.numel():
            pieces.append(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type] # arrays are buffers
        end = spec.offset + spec.nbytes
    return pieces


def _header(specs: tuple[TensorSpec, ...], nbytes: int) -> bytes:
    listed: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for number, spec in enumerate(specs):
        if spec.offset > end:
            listed[f"{PAD_PREFIX}{number}"] = {
                "dtype": "U8",
                "shape": [spec.offset - end],
                "data_offsets": [end, spec.offset],
            }
        end = spec.offset + spec.nbytes
        listed[spec.name] = {
            "dtype": SAFETENSORS_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [spec.offset, end],
        }
    assert end == nbytes, "the last tensor ends the data"
    text = json.dumps(listed, separators=(",", ":")).encode()
    padding = -(8 + len(text)) % DATA_ALIGNMENT
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
