"""The shard format: ordinary safetensors, aligned, and on disk whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lamella_engine.errors import CheckpointError, ShardError
from lamella_engine.shard import DATA_ALIGNMENT, TENSOR_ALIGNMENT
from lamella_engine.shard_check import read_shard_layout
from lamella_engine.shard_writer import ShardRecord, lay_out, write_shard
from lamella_engine.weight_source import Conversion, TensorShape

ODD = {
    "weight": torch.arange(35.0).view(5, 7),
    "bias": torch.arange(3, dtype=torch.float16),
    "scale": torch.tensor(2.5, dtype=torch.bfloat16),
    "steps": torch.arange(5),
    "mask": torch.tensor([True, False, True]),
    "aligned": torch.ones(16, 4),
    "empty": torch.zeros(0, 4),
}


def _shape(name: str, value: torch.Tensor) -> TensorShape:
    return TensorShape(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))


def _steps(tensors: dict[str, torch.Tensor]) -> list[Conversion]:
    return [
        Conversion((_shape(name, value),), (name,), lambda name=name, value=value: {name: value})  # type: ignore[misc]
        for name, value in tensors.items()
    ]


def _write(path: Path, tensors: dict[str, torch.Tensor], steps: Iterable[Conversion] | None = None) -> ShardRecord:
    layout = lay_out(_shape(name, value) for name, value in tensors.items())
    return write_shard(path, layout, _steps(tensors) if steps is None else steps, lambda name: name, lambda done: None)


@pytest.mark.parametrize("names", [list(ODD), ["bias"], ["aligned"], ["scale", "mask", "bias"], ["empty", "scale"]])
def test_a_shard_is_ordinary_safetensors_with_aligned_data(names: list[str], tmp_path: Path) -> None:
    tensors = {name: ODD[name] for name in names}

    _write(tmp_path / "layer.safetensors", tensors)

    shard = read_shard_layout(tmp_path / "layer.safetensors", "model")
    assert shard.data_start % DATA_ALIGNMENT == 0
    assert {spec.name for spec in shard.tensors} == set(names)
    raw = (tmp_path / "layer.safetensors").read_bytes()
    with safe_open(tmp_path / "layer.safetensors", "pt") as file:
        stored = set(file.keys())
        assert {name for name in stored if not name.startswith("__pad__.")} == set(names)
        for spec in shard.tensors:
            assert spec.offset % TENSOR_ALIGNMENT == 0
            assert torch.equal(file.get_tensor(spec.name), tensors[spec.name])
            ours = raw[shard.data_start + spec.offset : shard.data_start + spec.offset + spec.nbytes]
            assert ours == tensors[spec.name].reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_of_whole_64_bytes_need_no_padding(tmp_path: Path) -> None:
    _write(tmp_path / "layer.safetensors", {"a": torch.ones(16), "b": torch.ones(32), "c": torch.ones(16, 16)})

    with safe_open(tmp_path / "layer.safetensors", "pt") as file:
        assert set(file.keys()) == {"a", "b", "c"}


def test_the_record_is_that_of_the_file(tmp_path: Path) -> None:
    record = _write(tmp_path / "layer.safetensors", ODD)

    raw = (tmp_path / "layer.safetensors").read_bytes()
    assert record == ShardRecord("layer.safetensors", len(raw), hashlib.sha256(raw).hexdigest())


def test_the_same_tensors_make_the_same_bytes(tmp_path: Path) -> None:
    first = _write(tmp_path / "a.safetensors", ODD)
    second = _write(tmp_path / "b.safetensors", {name: ODD[name].clone() for name in ODD})

    assert first.sha256 == second.sha256


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), CheckpointError("damaged"), OSError(5, "Input/output error")])
def test_a_conversion_that_fails_leaves_no_file(fault: BaseException, tmp_path: Path) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise fault

    steps = [*_steps({"aligned": ODD["aligned"]}), Conversion((_shape("bias", ODD["bias"]),), ("bias",), fail)]

    with pytest.raises((KeyboardInterrupt, CheckpointError, ShardError)):
        _write(tmp_path / "layer.safetensors", {name: ODD[name] for name in ("aligned", "bias")}, steps)

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "made",
    [{"bias": torch.zeros(4, dtype=torch.float16)}, {"bias": torch.zeros(3)}, {}, {"other": ODD["bias"]}],
)
def test_a_result_that_was_not_planned_is_refused(made: dict[str, torch.Tensor], tmp_path: Path) -> None:
    step = Conversion((_shape("bias", ODD["bias"]),), ("stored_bias",), lambda: made)

    with pytest.raises(CheckpointError, match="bias"):
        _write(tmp_path / "layer.safetensors", {"bias": ODD["bias"]}, [step])

    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"cannot write .*gone/layer\.safetensors"):
        _write(tmp_path / "gone" / "layer.safetensors", ODD)
