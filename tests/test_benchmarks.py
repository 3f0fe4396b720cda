"""The side-by-side benchmark: what is computed from figures, what is proven cold, and one tiny run from end to end."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.calibrate import disk_bandwidth
from benchmarks.checkpoint import LlamaShape, build_checkpoint, tensor_bytes, weight_files
from benchmarks.coldness import ReadCount, cached_share, drop_file_cache, prove
from benchmarks.machine import Bystanders
from benchmarks.peers import measure_margins
from benchmarks.plot import PlotError, efficiencies, plot, rates
from benchmarks.report import compare_tokens, derive, differences, limits, table
from benchmarks.stage import run_stage
from benchmarks.sweep import main

TINY = LlamaShape(layers=3, hidden=64, ffn=96, vocab=512, heads=4, kv_heads=2, dtype="float32")
TINY_OPTIONS = ["--layers", "3", "--hidden", "64", "--ffn", "96", "--vocab", "512", "--heads", "4", "--kv-heads", "2"]
QUICK = ["--sweeps", "2", "--disk-sweeps", "2", "--tokens", "2", "--cold-tokens", "1", "--calibration-s", "0.05"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(TINY, tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run with a peer that works and one that is installed but broken."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "packages/airllm").mkdir(parents=True)
    (directory / "packages/airllm/__init__.py").write_text("raise ImportError('this installation is broken')\n")
    command = ["--device", "cpu", "--dtype", "float32", *TINY_OPTIONS, *QUICK, "--tiers", "disk", "--sequences", "1,2"]
    command += ["--json", str(directory / "run.json"), "--work-dir", str(directory / "work")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(directory / "packages"))
        status = main([*command, "--peers", "airllm,accelerate"])
    results: dict[str, Any] = json.loads((directory / "run.json").read_text())
    return results | {"status": status}


def test_checkpoint_loads_in_transformers_and_its_layers_differ(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")

    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not torch.equal(weights[0], weights[1])
    assert 0.018 < float(weights[0].detach().std()) < 0.022
    assert torch.equal(model.model.norm.weight, torch.ones(TINY.hidden))
    assert sum(tensor_bytes(checkpoint).values()) == TINY.nbytes


def test_checkpoint_has_one_file_a_module_and_a_tokenizer(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    assert len(weight_files(checkpoint)) == TINY.layers + 3
    for name, file in index["weight_map"].items():
        with safe_open(checkpoint / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - not a dictionary
    assert tokenizer.decode(tokenizer.encode("naïve, twice")) == "naïve, twice"


def test_same_shape_gives_the_same_bytes(tmp_path: Path, checkpoint: Path) -> None:
    again = build_checkpoint(TINY, tmp_path / "again")

    for one, other in zip(weight_files(checkpoint), weight_files(again), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_checkpoint_of_another_shape_replaces_the_one_that_lies_there(tmp_path: Path) -> None:
    build_checkpoint(TINY, tmp_path / "llama")
    smaller = LlamaShape(**(asdict(TINY) | {"layers": 1}))

    build_checkpoint(smaller, tmp_path / "llama")

    assert len(weight_files(tmp_path / "llama")) == 4


def test_sizes_that_cannot_be_a_llama_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        LlamaShape(layers=1, hidden=64, ffn=64, vocab=512, heads=3, kv_heads=1)


def test_dropped_file_is_out_of_the_cache_or_counted_as_cached(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 20))
    path.read_bytes()
    warm = cached_share([path])

    drop_file_cache([path])

    cold = cached_share([path])
    assert warm is None or (cold is not None and 0 <= cold <= warm <= 1)


@pytest.mark.parametrize(
    ("before", "after", "label"),
    [
        (ReadCount(10, 10), ReadCount(1010, 1010), "cold"),
        (ReadCount(10, 10), ReadCount(5010, 20), "warm"),  # the disk was busy for somebody else
        (ReadCount(10, 10), ReadCount(510, 510), "mixed"),
        (ReadCount(10, 0), ReadCount(1010, 0), "cold"),  # a process counter that never counts
        (ReadCount(None, 0), ReadCount(None, 0), "unproven"),
        (ReadCount(None, None), ReadCount(None, None), "unproven"),
    ],
)
def test_label_is_what_the_counters_prove(before: ReadCount, after: ReadCount, label: str) -> None:
    assert prove(before, after, 1000).label == label


def test_disk_is_measured_at_several_depths(checkpoint: Path) -> None:
    disk = disk_bandwidth(weight_files(checkpoint), seconds_per_depth=0.02)

    assert disk["bytes_per_s"] == max(disk["depths"].values()) > 0
    assert set(disk["depths"]) == {"1", "2", "4", "8", "16"}


def test_work_of_others_is_told_from_ones_own() -> None:
    bystanders = Bystanders()

    sum(range(3_000_000))

    busy = bystanders.busy_cores()
    assert busy is None or 0 <= busy <= 1.05 * (os.cpu_count() or 1) + 0.5


def test_limit_is_the_slowest_lane() -> None:
    plan = {"bytes": {"vram": 300, "ram": 500, "disk": 200}}
    lanes = {"disk": {"bytes_per_s": 100}, "h2d_bytes_per_s": 100.0, "device_memory_bytes_per_s": 1000.0}

    seconds = limits(plan, 8, {"swept_bytes": 1000, "active_parameters": 500}, lanes | {"operations_per_s": 1000.0})

    assert seconds == {"disk": 2.0, "bus": 7.0, "memory": 1.0, "compute": 8.0}


def test_tokens_are_compared_with_plain_transformers_and_the_first_difference_is_named() -> None:
    results = _figures() | {"margins": {"2": {"top": [7, 9], "logits": [1.5, 1.5], "margin": 0.0}}}

    outcome = compare_tokens(results)

    assert outcome["reference"] == "transformers N=1"
    assert outcome["compared"]["airllm N=1"] == {"tokens_equal": True, "compared": 3}
    differing = outcome["compared"]["lamella ram N=1"]
    assert (differing["tokens_equal"], differing["first_difference"], differing["token"]) == (False, 2, 9)
    assert differing["top_two"]["margin"] == 0.0
    assert differences(results)[0].shared_ids == [5, 6]


def test_tokens_of_a_peer_that_changes_the_weights_are_not_compared() -> None:
    results = _figures()
    results["peers"]["airllm"]["compression"] = "4bit"

    outcome = compare_tokens(results)

    assert "airllm N=1" not in outcome["compared"]
    assert derive(results)["against_peers"]["ram"]["airllm"] == 60.0


def test_ratios_compare_cold_with_cold_and_warm_with_warm() -> None:
    derived = derive(_figures())

    assert derived["against_peers"] == {"ram": {"airllm": 60.0, "transformers": 1.0}, "disk": {"airllm": 4.0}}
    assert derived["lamella"]["ram"]["time_against_one"]["8"] == pytest.approx(1.5)
    assert derived["lamella"]["ram"]["1"]["binding"] == "bus"
    assert derived["lamella"]["ram"]["1"]["efficiency"] == pytest.approx(0.5)


def test_a_disk_is_judged_by_plain_reads_beside_the_sweeps() -> None:
    figures = derive(_figures())["lamella"]["disk"]["1"]

    assert figures["binding"] == "disk"
    assert figures["limit_s_per_sweep"] == pytest.approx(50 / 40)
    assert figures["efficiency"] == pytest.approx(50 / 40 / 2.0)


def test_stage_that_fails_is_reported_with_its_error_and_its_log(tmp_path: Path) -> None:
    report = run_stage("unknown", "no-such-peer", _peer_spec(tmp_path), tmp_path, deadline_s=100.0)

    assert "no-such-peer" in report["error"]
    assert any("ValueError" in line for line in report["log_tail"])


def test_margin_is_the_gap_between_the_two_best_tokens_of_a_full_forward(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    with torch.inference_mode():
        best = torch.topk(model(torch.tensor([[3, 4, 5]])).logits[0, -1], 2)

    spec = {"checkpoint": str(checkpoint), "device": "cpu", "prefixes": [[3, 4, 5]]}
    *_, report = measure_margins(spec)

    assert report["margins"][0]["top"] == best.indices.tolist()
    assert report["margins"][0]["margin"] == pytest.approx(float(best.values[0] - best.values[1]))


def test_stage_that_outlasts_its_deadline_is_ended_and_says_so(tmp_path: Path) -> None:
    report = run_stage("slow", "no-such-peer", _peer_spec(tmp_path), tmp_path, deadline_s=0.2)

    assert report["error"] == "did not end within 0.2 s"
    assert report["wall_s"] < 60


@pytest.mark.timeout(400)
def test_run_measures_lamella_and_peers_on_equal_tokens(run: dict[str, Any]) -> None:
    batches, derived = run["lamella"]["disk"]["sequences"], run["derived"]

    assert set(batches) == {"1", "2"}
    for count, batch in batches.items():
        assert batch["s_per_sweep"] > 0
        assert batch["label"] in ("cold", "warm", "mixed", "unproven")
        assert derived["lamella"]["disk"][count]["binding"] in ("disk", "memory", "compute")
    offload = run["peers"]["accelerate-disk"]["sequences"]["1"]
    assert offload["kept"]["samples"] == 2
    assert offload["dropped"]["samples"] == 1
    assert run["peers"]["accelerate-disk"]["disk_bytes_placed"] > 0
    compared = derived["tokens"]["compared"]
    assert derived["tokens"]["reference"] == "transformers N=1"
    assert compared["lamella disk N=1"] == {"tokens_equal": True, "compared": len(batches["1"]["token_ids"])}
    assert compared["accelerate-disk N=1"]["tokens_equal"]


@pytest.mark.timeout(400)
def test_run_says_where_how_and_against_what_it_measured(run: dict[str, Any]) -> None:
    assert run["command"].startswith("python -m benchmarks.sweep --device cpu")
    assert {"date", "cpu", "cores", "ram_bytes", "gpu", "disk", "versions"} <= set(run["machine"])
    assert {"host_memory_bytes_per_s", "operations_per_s", "disk"} <= set(run["calibration"])
    assert run["model"]["bytes"] == TINY.nbytes
    alone = run["lamella"]["disk"]["sequences"]["1"]
    assert alone["plan"]["bytes"]["disk"] > 0
    assert len(alone["plain_read_bytes_per_s"]) == 2
    assert min(alone["plain_read_bytes_per_s"]) > 0
    assert run["lamella"]["disk"]["peak_rss_bytes"] > run["lamella"]["disk"]["rss_before_open_bytes"] > 0
    assert run["lamella"]["disk"]["others_busy_cores"] >= 0


@pytest.mark.timeout(400)
def test_peer_that_fails_is_reported_and_does_not_sink_the_run(run: dict[str, Any]) -> None:
    assert run["status"] == 1
    assert "this installation is broken" in run["peers"]["airllm"]["error"]
    assert "error" not in run["peers"]["accelerate-disk"]
    assert "airllm: ImportError" in table(run)


def test_run_without_time_names_what_it_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", *TINY_OPTIONS, "--budget-s", "1", "--json", str(tmp_path / "run.json")]

    status = main([*options, "--work-dir", str(tmp_path / "work")])

    results = json.loads((tmp_path / "run.json").read_text())
    assert status == 1
    assert [skipped["stage"] for skipped in results["skipped"]] == ["shards"]
    assert "skipped shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cpu", "--cap-gib", "4"], "--ram"),
        (["--device", "tpu"], "use cpu, cuda or cuda:N"),
        (["--heads", "5"], "do not divide"),
        (["--model", "/nowhere/at/all"], "name a checkpoint directory"),
        (["--json", "/nowhere/at/all/run.json"], "make it first"),
    ],
)
def test_options_that_cannot_work_say_what_to_use(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 2
    assert words in capsys.readouterr().err


def test_lines_of_the_picture_come_from_the_results_alone() -> None:
    results = _figures()
    results["derived"] = derive(results)

    lines = {line.name: line for line in rates(results)}

    assert lines["Lamella, ram"].sequences == [1, 8]
    assert lines["airllm, cache dropped (cold)"].values == [0.125]
    assert [line.name for line in efficiencies(results)] == ["Lamella, ram", "Lamella, disk"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib (extra `bench`) is not here")
def test_picture_is_an_svg_and_the_same_every_time(tmp_path: Path) -> None:
    results = _figures()
    results["derived"] = derive(results)

    plot(results, tmp_path / "one.svg")
    plot(results, tmp_path / "two.svg")

    assert (tmp_path / "one.svg").read_text().lstrip().startswith("<?xml")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is here")
def test_missing_matplotlib_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match=r"pip install 'lamella\[bench\]'"):
        plot(_figures(), tmp_path / "one.svg")


def _peer_spec(directory: Path) -> dict[str, Any]:
    spec = {"checkpoint": str(directory), "device": "cpu", "cap_bytes": None, "sequences": [1], "prompts": [[3, 4]]}
    return spec | {"warm_tokens": 1, "cold_tokens": 0, "deadline_s": 60.0, "work_dir": str(directory)}


def _figures() -> dict[str, Any]:
    """Results as a run writes them, cut down to what is computed with."""
    ram_plan = {"bytes": {"vram": 0, "ram": 50, "disk": 0}}
    disk_plan = {"bytes": {"vram": 0, "ram": 0, "disk": 50}}

    def batch(seconds: float, count: int, label: str, token_ids: list[int]) -> dict[str, Any]:
        rate = {"s_per_sweep": seconds, "mean_s_per_sweep": seconds, "tokens_per_s": count / seconds}
        return rate | {"label": label, "token_ids": token_ids, "plan": disk_plan if label == "cold" else ram_plan}

    def peer(kept: float, dropped: float | None, token_ids: list[int]) -> dict[str, Any]:
        figures: dict[str, Any] = {"token_ids": [token_ids]}
        for key, seconds, label in (("kept", kept, "warm"), ("dropped", dropped, "cold")):
            if seconds is not None:
                figures[key] = {"s_per_token": seconds, "tokens_per_s": 1 / seconds, "label": label}
        return {"sequences": {"1": figures}}

    ram = {"1": batch(0.1, 1, "warm", [5, 6, 9]), "8": batch(0.15, 8, "warm", [5, 6, 7])}
    return {
        "model": {"swept_bytes": 50, "active_parameters": 25, "layers": 2, "bytes": 60, "dtype": "bfloat16"},
        "calibration": {"disk": {"bytes_per_s": 50}, "h2d_bytes_per_s": 1000, "device_memory_bytes_per_s": 5000},
        "lamella": {
            "ram": {"sequences": ram},
            "disk": {"sequences": {"1": batch(2.0, 1, "cold", [5, 6, 7]) | {"plain_read_bytes_per_s": [40, 60, 20]}}},
        },
        "peers": {"airllm": peer(6.0, 8.0, [5, 6, 7]), "transformers": peer(0.1, None, [5, 6, 7, 8])},
    }
