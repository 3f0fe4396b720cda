"""`lamella plan`, as a user types it: tables, JSON, exit codes, and one line for each error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lamella_engine.plan_cli import app
from lamella_engine.plan_report import ranges
from lamella_engine.shard_store import ShardStore
from tests.engine.fake_hub import serve_hub

GIB = 1024**3
SHAPE_70B: Mapping[str, object] = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
    "dtype": "float16",
}  # fmt: skip
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, where the command looks without being told."""
    monkeypatch.setenv("LAMELLA_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check_failed(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


@without_gpu
def test_a_hub_model_is_planned_from_its_config_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub(tmp_path, monkeypatch) as hub:
        hub.add("owner/big", {"config.json": json.dumps(SHAPE_70B).encode()})

        shown = run("owner/big", "--vram", "8GiB", "--ram", "16GiB", "--disk-space", "1TB")

    assert shown.exit_code == 0, shown.output
    for words in ("owner/big (hub): 80 layers", "slots (2)", "keys and values", "Predicted", "disk", "assumed"):
        assert words in shown.stdout
    assert "there is no such card here" in shown.stdout
    assert not root.exists()


@without_gpu
def test_json_says_the_same_in_bytes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(tmp_path, monkeypatch) as hub:
        hub.add("owner/big", {"config.json": json.dumps(SHAPE_70B).encode()})
        arguments = (
            "owner/big",
            "--vram",
            "24GiB",
            "--ram",
            "40GB",
            "--h2d",
            "10GB/s",
            "--disk-space",
            "1TB",
            "--json",
        )

        told = json.loads(run(*arguments, "--disk", "1GB/s", "--memory", "300GB/s", "--flops", "10T").stdout)

    plan = told["plan"]
    assert plan["vram"]["budget"] == 24 * GIB
    assert sum(use["nbytes"] for use in plan["vram"]["uses"]) <= 24 * GIB
    assert plan["ram"]["budget"] == 40 * 10**9
    assert len(plan["layers"]) == 80
    assert {layer["tier"] for layer in plan["layers"]} == {"vram", "ram", "disk"}
    assert {layer["compute"] for layer in plan["layers"]} == {"cuda:0"}
    assert [each["num_sequences"] for each in told["predictions"]] == [1, 8, 64]
    assert told["bandwidths"]["h2d"] == {"value": 10e9, "origin": "given"}
    on_disk = sum(layer["nbytes"] for layer in plan["layers"] if layer["tier"] == "disk")
    assert told["predictions"][0]["seconds"] == pytest.approx(on_disk / 1e9)
    assert told["predictions"][0]["binding"] == "disk"


@without_gpu
def test_a_stored_model_is_planned_with_its_disk_measured(root: Path, tiny_llama_dir: Path) -> None:
    ShardStore(root).ensure("owner/tiny", source=tiny_llama_dir)

    shown = run("owner/tiny", "--offline", "--ram", "1GiB", "--layers")

    assert shown.exit_code == 0, shown.output
    assert "computed on cpu in float32" in shown.stdout
    assert "disk: " in shown.stdout
    assert "GB/s, measured here" in shown.stdout
    assert "assumed" not in shown.stdout
    assert "bus (host to device)" not in shown.stdout
    assert shown.stdout.count("│ layer ") == 4


@without_gpu
def test_a_directory_needs_no_store(root: Path, tiny_llama_dir: Path) -> None:
    told = json.loads(
        run(tiny_llama_dir, "--ram", "1GiB", "--dtype", "bfloat16", "--max-sequences", 2, "--json").stdout
    )

    assert told["found_in"] == "path"
    assert told["dtype"] == "bfloat16"
    assert told["sizes"]["expansion"] == 0.5
    assert told["plan"]["kv_tokens"] == 2 * 512
    assert told["plan"]["vram"] is None
    assert told["bandwidths"]["disk"]["origin"] == "assumed"
    assert "h2d" not in told["bandwidths"]
    assert not root.exists()


@without_gpu
def test_what_does_not_fit_says_by_how_much(root: Path, tiny_llama_dir: Path) -> None:
    check_failed(run(tiny_llama_dir, "--vram", "30MiB", "--ram", "0"), 1, "30.0 MiB", "are missing", "--vram")
    check_failed(run(tiny_llama_dir, "--device", "cpu", "--ram", "30MiB"), 1, "are missing", "--ram")
    check_failed(run(tiny_llama_dir, "--ram", "1GiB", "--kv-tokens", 10**8), 1, "--kv-tokens")


def test_shards_that_do_not_fit_the_disk_say_by_how_much(root: Path, tiny_llama_dir: Path) -> None:
    check_failed(run(tiny_llama_dir, "--disk-space", "100kB"), 1, "shards", "97.7 KiB", "are missing", "--store")


WRONG_CALLS: list[tuple[list[object], list[str]]] = [
    (["--vram", "auto"], ["--vram is 'auto'", "no GPU here"]),
    (["--vram", "80%"], ["--vram is '80%'"]),
    (["--vram", "4G"], ["--vram is '4G'", "GiB"]),
    (["--ram", "lots"], ["--ram is 'lots'"]),
    (["--disk", "0GB/s"], ["--disk is '0GB/s'"]),
    (["--disk-space", "much"], ["--disk-space is 'much'"]),
    (["--flops", "fast"], ["--flops is 'fast'"]),
    (["--dtype", "int8"], ["--dtype is 'int8'", "bfloat16"]),
    (["--device", "cpu", "--vram", "4GiB"], ["--vram is '4GiB'", "CPU"]),
    (["--device", "cpu", "--h2d", "4GB/s"], ["--h2d is '4GB/s'", "CPU"]),
    (["--max-sequences", 8, "--sweep-tokens", 4], ["sweep_tokens (4)", "max_sequences (8)"]),
]


@without_gpu
@pytest.mark.parametrize(("arguments", "words"), WRONG_CALLS)
def test_a_wrong_call_is_told_apart_from_a_model_that_does_not_fit(
    arguments: list[object], words: list[str], root: Path, tiny_llama_dir: Path
) -> None:
    check_failed(run(tiny_llama_dir, *arguments), 2, *words)


@without_gpu
def test_a_device_that_is_not_here_needs_a_budget(root: Path, tiny_llama_dir: Path) -> None:
    check_failed(run(tiny_llama_dir, "--device", "cuda:1"), 1, "cuda:1")
    check_failed(run(tiny_llama_dir, "--device", "tpu", "--vram", "4GiB"), 1, "tpu")

    told = json.loads(run(tiny_llama_dir, "--device", "cuda:1", "--vram", "4GiB", "--json").stdout)

    assert told["plan"]["device"] == "cuda:1"


def test_what_is_nowhere_is_not_asked_for_offline(root: Path) -> None:
    check_failed(run("owner/nothing", "--offline"), 1, "owner/nothing", "offline")


def test_layers_are_listed_in_few_words() -> None:
    assert ranges([0, 1, 2, 3]) == "0-3"
    assert ranges([5]) == "5"
    assert ranges([0, 1, 4, 6, 7]) == "0-1, 4, 6-7"
    assert ranges([0, 8, 16, 24]) == "0, 8, ... 24 (every 8)"
    assert ranges([]) == ""


@pytest.mark.real_model
@without_gpu
def test_a_gguf_file_is_planned_as_it_would_be_stored(root: Path, smollm2_gguf: Path) -> None:
    told = json.loads(run(smollm2_gguf, "--vram", "1GiB", "--ram", "2GiB", "--dtype", "float16", "--json").stdout)

    assert sum(told["sizes"]["layers"]) > 400 * 1024**2
    assert told["sizes"]["expansion"] == 0.5
    assert told["sizes"]["is_tied"]
    assert {layer["tier"] for layer in told["plan"]["layers"]} == {"vram"}
