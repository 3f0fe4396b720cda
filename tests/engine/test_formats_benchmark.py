"""The benchmark of packed formats runs and records what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.formats import main

SMALL = ["--device", "cpu", "--repeats", "1", "--working-set", "1"]


def test_every_format_is_measured_beside_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "formats.json"

    code = main([*SMALL, "--rows", "64", "--columns", "256", "--json", str(file)])

    report = json.loads(file.read_text())
    assert code == 0
    assert report["machine"]["cpu"]
    assert report["copy"]["gb_per_s"] > 0
    assert set(report["formats"]) == {"nf4", "fp4", "int8", "lossless"}
    for found in report["formats"].values():
        assert {"used", "torch"} <= found["decode"].keys()
        assert all(speed["seconds"] > 0 for speed in found["decode"].values())
    assert report["formats"]["lossless"]["relative_error"] == 0
    assert "expands at GB/s" in capsys.readouterr().out


def test_a_matrix_of_a_file_is_measured_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"matrix": torch.ones(40, 72)}, tmp_path / "weights.safetensors")

    code = main([*SMALL, "--dtype", "float32", "--weights", str(tmp_path / "weights.safetensors"), "matrix"])

    assert code == 0
    assert "[40, 72] to float32" in capsys.readouterr().out
