"""`lamella bench`, as a user types it: figures beside their limit, JSON, a trace, exit codes, errors of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lamella_engine.bench import slope
from lamella_engine.bench_cli import app
from lamella_engine.sequence_types import EngineCounters
from lamella_engine.shard_store import ShardStore
from lamella_engine.stored_form import StoredForm
from lamella_engine.sweep_profile import SweepProfile

QUICK = ("--device", "cpu", "--tokens", "4", "--prompt-tokens", "8", "--offline")
CPU_LANES = {"disk", "memory", "compute"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, where the command looks without being told."""
    monkeypatch.setenv("LAMELLA_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def measured(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def layer_bytes(report: dict[str, Any]) -> int:
    return sum(layer["nbytes"] for layer in report["plan"]["layers"])


def check_failed(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    for word in words:
        assert word in line


def test_every_figure_has_its_limit_beside_it(root: Path, tiny_llama_dir: Path) -> None:
    shown = run(tiny_llama_dir, *QUICK, "--sequences", "1,3")

    assert shown.exit_code == 0, shown.output
    for words in (
        "4 layers", "computed on cpu in float32", "s/sweep", "tokens/s", "limit s/sweep", "efficiency", "from disk",
        "from RAM", "read s", "copy s", "compute s", "bubble s", "measured in this run: disk ", "peak memory",
    ):  # fmt: skip
        assert words in shown.stdout
    first_cells = [line.strip("│ ").split()[0] for line in shown.stdout.splitlines() if line.startswith("│")]
    assert first_cells == ["1", "3"] * 2
    assert "3 side by side: 4 sweeps in " in shown.stderr
    assert "device memory" not in shown.stdout


def test_json_says_the_same_in_plain_numbers(root: Path, tiny_llama_dir: Path) -> None:
    ShardStore(root).ensure("owner/tiny", source=tiny_llama_dir)

    told = measured("owner/tiny", *QUICK, "--ram", "1GiB", "--sequences", "2,5,2")

    assert [row["num_sequences"] for row in told["rows"]] == [2, 5]
    for row in told["rows"]:
        assert len(row["seconds"]) == row["profile"]["sweeps"] == 4
        assert row["tokens_per_second"] == pytest.approx(row["num_sequences"] / row["s_per_sweep"])
        assert row["efficiency"] == pytest.approx(row["limit"]["seconds"] / row["s_per_sweep"])
        assert row["limit"]["binding"] in CPU_LANES
        assert 1 <= row["profile"]["ram_bytes"] / layer_bytes(told) < 1.02  # and some embedding rows
        assert row["profile"]["disk_bytes"] == row["profile"]["read_s"] == row["profile"]["copy_s"] == 0
        assert row["profile"]["compute_s"] > 0
        assert row["preemptions"] == 0
    assert told["facts"]["model"] == "owner/tiny"
    assert told["facts"]["max_sequences"] == 5
    assert told["bandwidths"]["h2d"] is None
    assert all(told["bandwidths"][name] > 0 for name in ("disk", "device_memory", "flops"))
    assert told["memory"]["peak_rss"] > told["facts"]["size_bytes"]
    assert told["memory"]["peak_pinned"] is None


def test_layers_that_stay_on_disk_are_read_for_every_sweep(root: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"

    told = measured(tiny_llama_dir, *QUICK, "--ram", "0", "--sequences", "1", "--trace", trace)

    tiers = {layer["tier"] for layer in told["plan"]["layers"]}
    assert tiers == {"disk"}
    profile = told["rows"][0]["profile"]
    assert 1 <= profile["disk_bytes"] / layer_bytes(told) < 1.02  # and some embedding rows
    assert profile["ram_bytes"] == 0
    assert profile["read_s"] > 0
    assert told["trace"] == str(trace)
    events = [event for event in json.loads(trace.read_text()) if event["ph"] == "X"]
    assert {"sweep"} < {event["name"] for event in events}
    assert len({event["tid"] for event in events}) == 3  # reading, computing, sweeps; a CPU copies nothing


def test_sequences_that_read_their_prompts_last_are_waited_for(
    root: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    told = measured(
        tiny_checkpoint("llama"), "--device", "cpu", "--sequences", "64", "--prompt-tokens", "60", "--tokens", "3"
    )

    (row,) = told["rows"]
    assert len(row["seconds"]) == 3
    assert row["preemptions"] == 0


def test_a_model_that_does_not_fit_says_by_how_much(root: Path, tiny_llama_dir: Path) -> None:
    check_failed(run(tiny_llama_dir, *QUICK, "--ram", "20MiB"), 1, "are missing", "--ram", "lower --sequences")


WRONG_CALLS: list[tuple[list[object], list[str]]] = [
    (["--sequences", "0"], ["--sequences", "0", "from 1 to"]),
    (["--sequences", "many"], ["--sequences is 'many'", "1,8,64"]),
    (["--sequences", "1000000"], ["--sequences", "1000000"]),
    (["--prompt-tokens", "600", "--sequences", "1"], ["context has 512", "--prompt-tokens"]),
    (["--sequences", "64", "--kv-tokens", "1024"], ["--kv-tokens is 1024", "at least"]),
    (["--ram", "lots"], ["ram is 'lots'"]),
    (["--vram", "4GiB"], ["--vram is '4GiB'", "CPU"]),
    (["--dtype", "int8"], ["int8", "bfloat16"]),
    (["--trace", "/nowhere/at/all.json"], ["--trace", "/nowhere/at"]),
    (["--trace", "/"], ["--trace", "directory"]),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG_CALLS)
def test_a_wrong_call_is_told_apart_from_a_model_that_does_not_fit(
    arguments: list[object], words: list[str], root: Path, tiny_llama_dir: Path
) -> None:
    check_failed(run(tiny_llama_dir, "--device", "cpu", "--offline", *arguments), 2, *words)


def test_what_cannot_be_had_fails_in_one_line(root: Path, tiny_llama_dir: Path) -> None:
    check_failed(run("owner/nothing", "--offline"), 1, "owner/nothing", "offline")
    check_failed(run(tiny_llama_dir, "--device", "tpu"), 1, "tpu")


def test_a_profile_is_what_the_counters_rose_by_a_sweep() -> None:
    before = EngineCounters(
        running=0, waiting=0, sweeps=5, tokens=9, streamed_bytes=0, peak_rss_bytes=1, last_sweep_at=None,
        disk_bytes=100, ram_bytes=10, vram_bytes=0, read_s=1.0, copy_s=0.0, compute_s=2.0, sweep_s=4.0,
    )  # fmt: skip
    after = replace(before, sweeps=9, disk_bytes=500, ram_bytes=50, read_s=1.8, compute_s=3.0, sweep_s=7.0)

    profile = SweepProfile.between(before, after)

    assert (profile.sweeps, profile.disk_bytes, profile.ram_bytes, profile.vram_bytes) == (4, 100, 10, 0)
    assert profile.read_s == pytest.approx(0.2)
    assert profile.compute_s == pytest.approx(0.25)
    assert profile.bubble_s == pytest.approx(0.5)
    assert SweepProfile.between(before, before) == SweepProfile(0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)


def test_what_expanding_takes_is_told_apart_from_the_rest(root: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    name = ShardStore(root).ensure("tiny", source=tiny_checkpoint("llama"), form=StoredForm(quant="nf4")).name

    told = measured(name, *QUICK, "--ram", "0", "--sequences", "1,3")
    shown = run(name, *QUICK, "--ram", "0", "--sequences", "1")

    expansion = told["expansion"]
    assert len(expansion["layers_s"]) == 4
    assert all(seconds > 0 for seconds in expansion["layers_s"])
    assert expansion["head_s"] == 0
    assert expansion["sweep_s"] == pytest.approx(sum(expansion["layers_s"]))
    for row in told["rows"]:
        assert row["profile"]["expand_s"] == expansion["sweep_s"]
        assert row["expand_s_per_layer"] == pytest.approx(expansion["sweep_s"] / 4)
        rest = max(0.0, row["profile"]["compute_s"] - expansion["sweep_s"])
        assert row["other_s_per_layer"] == pytest.approx(rest / 4)
    assert "expanding s" in shown.stdout
    assert "expanding packed weights: " in shown.stdout
    assert "what else a layer takes, beside moving it" in shown.stdout


def test_experts_that_are_not_visited_are_not_expanded(root: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    name = ShardStore(root).ensure("tiny", source=tiny_checkpoint("qwen3_moe"), form=StoredForm(quant="nf4")).name

    told = measured(name, *QUICK, "--ram", "0", "--sequences", "1")

    expansion, (row,) = told["expansion"], told["rows"]
    share = row["profile"]["experts_visited"] / (4 * expansion["num_expert_layers"])
    assert expansion["num_expert_layers"] == 4
    assert 0 < share < 1
    assert 0 < expansion["experts_s"] < expansion["sweep_s"]
    unvisited_s = expansion["experts_s"] * (1 - share)
    assert row["profile"]["expand_s"] == pytest.approx(expansion["sweep_s"] - unvisited_s)


def test_nothing_is_expanded_where_layers_stay_ready(root: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    name = ShardStore(root).ensure("tiny", source=tiny_checkpoint("llama"), form=StoredForm(quant="nf4")).name

    told = measured(name, *QUICK, "--ram", "1GiB", "--sequences", "1")
    shown = run(name, *QUICK, "--ram", "1GiB", "--sequences", "1")

    assert told["expansion"]["layers_s"] == [0.0] * 4
    assert told["expansion"]["sweep_s"] == told["expansion"]["head_s"] == 0
    assert told["rows"][0]["expand_s_per_layer"] == 0
    assert "expanding" not in shown.stdout
    assert "a layer takes, beside moving it" in shown.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_peaks_stay_within_the_budgets(root: Path, tiny_llama_dir: Path) -> None:
    told = measured(
        tiny_llama_dir, "--device", "cuda:0", "--vram", "1GiB", "--ram", "1GiB", "--sequences", "1,4", "--tokens", "4"
    )

    assert 0 < told["memory"]["peak_device_reserved"] <= told["plan"]["vram"]["budget"] == 1024**3
    assert told["memory"]["peak_pinned"] <= told["plan"]["ram"]["budget"]
    assert told["bandwidths"]["h2d"] > 0
    assert all(row["profile"]["compute_s"] > 0 for row in told["rows"])


def test_seconds_of_a_sweep_are_not_those_of_the_one_that_was_recorded() -> None:
    told_of_late = [0.0, 100.0, 107.0, 107.0, 121.0, 128.0, 135.0]  # 7 a sweep, but the first

    assert slope(told_of_late) == pytest.approx(7.0)
    assert slope([3.0, 5.0]) == 2.0
