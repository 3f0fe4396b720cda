"""Kinds of layers, experts and positions, held against the modules that transformers builds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from typer.testing import CliRunner

from lamella_engine import architecture
from lamella_engine.cli import app
from lamella_engine.inspection import inspect
from lamella_engine.model_traits import Rotary, has_linear_biases, layer_kinds, rotary_of
from lamella_engine.shard_store import ShardStore
from tests import tiny_models


def config_of(family: str, **changed: object) -> PretrainedConfig:
    return AutoConfig.for_model(family, **{**tiny_models.FAMILIES.get(family, {}), **changed}).get_text_config()


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "store")


def test_kinds_of_layers_are_counted_most_frequent_first() -> None:
    kinds = ["linear_attention"] * 3 + ["full_attention"]

    assert layer_kinds(config_of("qwen3_next", num_hidden_layers=4, layer_types=kinds)) == {
        "linear_attention": 3,
        "full_attention": 1,
    }
    assert layer_kinds(config_of("llama")) == {"full_attention": 4}
    assert layer_kinds(config_of("mistral", sliding_window=8)) == {"sliding_attention": 4}
    assert layer_kinds(config_of("mistral", sliding_window=None)) == {"full_attention": 4}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_experts_weigh_what_the_modules_weigh(
    family: str, tiny_checkpoint: Callable[[str], Path], store: ShardStore
) -> None:
    source = tiny_checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(source)
    by_layer: dict[str, int] = {}
    shared = 0
    for name, weight in model.named_parameters():
        if ".experts." in name:
            by_layer[name.split(".layers.")[1].split(".")[0]] = (
                by_layer.get(name.split(".layers.")[1].split(".")[0], 0) + weight.nbytes
            )
        elif "shared_expert" in name and "gate.weight" not in name.split("shared_expert_")[-1]:
            shared += weight.nbytes

    facts = inspect(source, store)

    assert facts.experts is not None
    assert (facts.experts.count, facts.experts.routed) == (4, 2)
    assert facts.experts.layers == len(by_layer)
    assert facts.experts.nbytes == sum(by_layer.values())
    assert facts.experts.expert_bytes == sum(by_layer.values()) // len(by_layer) // 4
    assert facts.experts.shared_bytes == shared
    assert facts.active_parameters < facts.parameters


def test_a_dense_model_has_no_experts(tiny_llama_dir: Path, store: ShardStore) -> None:
    facts = inspect(tiny_llama_dir, store)

    assert facts.experts is None
    assert facts.rotary == (Rotary(None, "default", 10000.0, 1.0, None),)


def test_rotary_positions_are_told_for_each_kind_of_layer() -> None:
    two = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
           "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}  # fmt: skip

    assert rotary_of(config_of("gemma3_text", rope_parameters=two)) == (
        Rotary("sliding_attention", "default", 1e4, 1.0, None),
        Rotary("full_attention", "linear", 1e6, 1.0, 8.0),
    )
    assert rotary_of(config_of("gpt_neox"))[0].share == 0.25
    assert rotary_of(config_of("gpt2")) == ()


@pytest.mark.parametrize(
    ("family", "changed", "expected"),
    [
        ("bloom", {}, True),
        ("falcon", {"alibi": True}, True),
        ("falcon", {"alibi": False}, False),
        ("mpt", {}, True),
        ("llama", {}, False),
        ("gpt2", {}, False),
    ],
)
def test_linear_biases_are_told_and_exclude_rotary_positions(
    family: str, changed: dict[str, object], expected: bool
) -> None:
    config = AutoConfig.for_model(family, **changed)
    built = architecture.build(config, torch.float32)

    assert has_linear_biases(config, built.layers) is expected
    assert not (expected and rotary_of(config))


def test_layers_that_all_leave_rotation_out_have_no_rotary_positions() -> None:
    assert rotary_of(config_of("smollm3", num_hidden_layers=4, no_rope_layers=[0] * 4)) == ()
    assert rotary_of(config_of("smollm3", num_hidden_layers=4, no_rope_layers=[1, 0, 0, 0]))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_tells_experts_and_rotary_positions(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(tiny_checkpoint("deepseek_v3")), "--store", str(tmp_path)]).stdout

    assert "4 of 24.0 KiB in 3 of 4 layers, a token visits 2" in shown
    assert "4: 4 of full attention" in shown
    assert "default, base 10000" in shown
