"""`lamella quality`, as a user types it: figures with intervals, JSON, exit codes, errors of one line."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lamella_engine.quality_cli import app
from lamella_engine.shard_store import ShardStore
from lamella_engine.stored_form import StoredForm

QUICK = ("--device", "cpu", "--offline", "--tokens", "200", "--window", "64")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, where the command looks without being told."""
    monkeypatch.setenv("LAMELLA_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check_failed(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    for word in words:
        assert word in line


def test_every_figure_has_its_interval_beside_it(root: Path, tiny_llama_dir: Path) -> None:
    shown = run(tiny_llama_dir, *QUICK, "--quant", "int8")

    assert shown.exit_code == 0, shown.output
    for words in (
        "int8 (", "against full precision", "95 % interval", "perplexity, full precision", "perplexity, int8",
        "perplexity, ratio", "KL divergence, nats a token", "99th percentile", "same first choice",
        "200 tokens scored in 7 windows of 64", "Persuasion", "SHA-256",
    ):  # fmt: skip
        assert words in shown.stdout
    assert "measure: 0 of 200 tokens (0 %)" in shown.stderr
    assert "measure: 200 of 200 tokens (100 %)" in shown.stderr


def test_json_says_all_of_it(root: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The miller counts the sacks of flour by the door. " * 100)
    ShardStore(root).ensure("owner/tiny", source=tiny_llama_dir)

    shown = run("owner/tiny", *QUICK, "--quant", "int8,layers.0=nf4", "--text", text, "--json")

    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert told["quant"] == "int8,layers.0=nf4"
    assert told["reference"]["name"] == "owner/tiny"
    assert told["candidate"]["name"].startswith("owner/tiny~int8-")
    assert told["candidate"]["size_bytes"] < told["reference"]["size_bytes"]
    assert told["text"] == str(text)
    assert len(told["text_sha256"]) == 64
    figures = told["figures"]
    assert (figures["tokens"], figures["windows"]) == (200, 7)
    for name in ("reference_perplexity", "candidate_perplexity", "perplexity_ratio", "divergence", "agreement"):
        assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]
    assert figures["divergence_p99"] >= figures["divergence"]["value"] > 0
    assert told["window"] == 64
    assert told["seconds"] > 0


def test_a_packed_model_of_the_store_is_measured_by_its_name(root: Path, tiny_llama_dir: Path) -> None:
    store = ShardStore(root)
    store.ensure("owner/tiny", source=tiny_llama_dir)
    packed = store.ensure("owner/tiny", form=StoredForm(quant="nf4,layers.1=int8"))

    shown = run(packed.name, *QUICK, "--json")

    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert (told["reference"]["name"], told["candidate"]["name"]) == ("owner/tiny", packed.name)
    assert told["figures"]["divergence"]["value"] > 0


def test_two_compute_types_are_compared_without_packing(root: Path, tiny_llama_dir: Path) -> None:
    shown = run(tiny_llama_dir, *QUICK, "--dtype", "bfloat16", "--reference-dtype", "float32", "--json")

    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert (told["reference"]["dtype"], told["candidate"]["dtype"]) == ("float32", "bfloat16")


WRONG_CALLS: list[tuple[list[object], list[str]]] = [
    ([], ["nothing to compare", "--quant"]),
    (["--quant", "bf16"], ["nothing to compare"]),
    (["--dtype", "float32", "--reference-dtype", "float32"], ["nothing to compare"]),
    (["--quant", "int5"], ["int5", "nf4"]),
    (["--quant", "int8", "--window", "2"], ["--window is 2", "at least"]),
    (["--quant", "int8", "--window", "4096"], ["--window is 4096", "512"]),
    (["--quant", "int8", "--tokens", "10"], ["--tokens is 10", "at least"]),
    (["--quant", "int8", "--ram", "lots"], ["ram is 'lots'"]),
    (["--quant", "int8", "--vram", "4GiB"], ["--vram is '4GiB'", "CPU"]),
    (["--quant", "int8", "--dtype", "int8"], ["int8", "bfloat16"]),
    (["--quant", "int8", "--reference-dtype", "half"], ["--reference-dtype is 'half'", "bfloat16"]),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG_CALLS)
def test_a_wrong_call_says_what_to_do(
    arguments: list[object], words: list[str], root: Path, tiny_llama_dir: Path
) -> None:
    check_failed(run(tiny_llama_dir, "--device", "cpu", "--offline", *arguments), 2, *words)


def test_texts_that_cannot_be_used_are_refused(root: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("Too short.")
    binary.write_bytes(b"\xff\xfe\x00")

    check_failed(run(tiny_llama_dir, *QUICK, "--quant", "int8", "--text", short), 2, "short.txt has", "longer text")
    check_failed(run(tiny_llama_dir, *QUICK, "--quant", "int8", "--text", binary), 2, "not text in UTF-8")
    check_failed(run(tiny_llama_dir, *QUICK, "--quant", "int8", "--text", tmp_path / "none"), 1, "none", "No such file")
    check_failed(run(tiny_llama_dir, *QUICK, "--quant", "int8", "--text", tmp_path), 1, "directory")


def test_what_cannot_be_had_or_does_not_fit_fails_in_one_line(root: Path, tiny_llama_dir: Path) -> None:
    check_failed(run("owner/nothing", *QUICK, "--quant", "int8"), 1, "owner/nothing", "offline")
    check_failed(run("owner/nothing~int8", *QUICK, "--quant", "nf4"), 2, "packed already")
    check_failed(run(tiny_llama_dir, "--device", "tpu", "--quant", "int8"), 1, "tpu")
    check_failed(run(tiny_llama_dir, *QUICK, "--quant", "int8", "--ram", "1MiB"), 1, "are missing", "share the budget")


def test_the_command_is_announced_to_the_command_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    announced = project["project"]["entry-points"]["lamella.commands"]["quality"]

    assert EntryPoint("quality", announced, "lamella.commands").load() is app
