"""Headers of safetensors files: whole ones are read, and no damaged one gets further than an error that names it."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lamella_engine.errors import CheckpointError
from lamella_engine.safetensors_header import read_header

FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _file(path: Path, header: object, data: bytes = b"\0" * 8, claimed: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + data)
    return path


def test_a_whole_file_is_read_in_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]
    tensors = {str(dtype): torch.zeros(3, 2, dtype=dtype) for dtype in dtypes}
    save_file(tensors, path)

    header = read_header(path)

    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == {
        name: (name.removeprefix("torch."), (3, 2)) for name in tensors
    }
    assert max(entry.start + entry.nbytes for entry in header.tensors.values()) == path.stat().st_size


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": FLOAT | {"data_offsets": [0, 16]}}, "has 16 bytes"),
        ({"a": FLOAT | {"data_offsets": [8, 0]}}, "has -8 bytes"),
        ({"a": FLOAT | {"data_offsets": [8, 16]}}, "hole"),
        ({"a": FLOAT | {"data_offsets": [0]}}, "data_offsets"),
        ({"a": FLOAT | {"data_offsets": [0, 8, 9]}}, "data_offsets"),
        ({"a": FLOAT | {"data_offsets": [-8, 0]}}, "data_offsets"),
        ({"a": FLOAT | {"data_offsets": ["0", "8"]}}, "data_offsets"),
        ({"a": FLOAT | {"shape": [-2]}}, "shape"),
        ({"a": FLOAT | {"shape": [True, 2]}}, "shape"),
        ({"a": FLOAT | {"shape": [2.0]}}, "shape"),
        ({"a": FLOAT | {"shape": None}}, "shape"),
        ({"a": FLOAT | {"shape": [2**40, 2**40]}}, "has 8 bytes"),
        ({"a": FLOAT | {"dtype": "F3"}}, "type 'F3'"),
        ({"a": FLOAT | {"dtype": ["F32"]}}, "type"),
        ({"a": "F32"}, "not described"),
        ({"a": FLOAT, "b": FLOAT}, "overlaps"),
        ({}, "belong to no tensor"),
        ([], "not a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"9" * 10_000, "not JSON"),
    ],
)
def test_a_wrong_header_is_refused_with_file_and_reason(header: object, reason: str, tmp_path: Path) -> None:
    path = _file(tmp_path / "model.safetensors", header)

    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(path)

    assert str(path) in str(caught.value)


@pytest.mark.parametrize("claimed", [2**63 + 1, 2**64 - 1, 100_000_001, 10_000])
def test_an_absurd_header_length_is_refused_before_it_is_read(claimed: int, tmp_path: Path) -> None:
    path = _file(tmp_path / "model.safetensors", {"a": FLOAT}, claimed=claimed)

    with pytest.raises(CheckpointError, match=f"claims {claimed} bytes"):
        read_header(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.zeros(2, 2)}, path)
    whole = path.read_bytes()

    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            read_header(path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = _file(tmp_path / "model.safetensors", {"a": FLOAT}, data=b"\0" * 9)

    with pytest.raises(CheckpointError, match="belong to no tensor"):
        read_header(path)


def test_random_damage_never_raises_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, path)
    whole = path.read_bytes()
    draw = random.Random(0)

    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            header = read_header(path)
        except CheckpointError:
            continue
        assert all(entry.start + entry.nbytes <= len(whole) for entry in header.tensors.values())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: No such file"):
        read_header(tmp_path / "absent.safetensors")
