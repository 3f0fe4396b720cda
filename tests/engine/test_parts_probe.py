"""Which families may read a prompt in parts: what a narrow copy says is what the family's own weights do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lamella_engine import architecture
from lamella_engine.narrow_copy import MAX_BYTES, Tree, give_weights, narrow_tree, shortened
from lamella_engine.sequence_state import SequenceState, StateForward
from tests import tiny_models

IDS = [3 + 11 * index % 120 for index in range(90)]
# Full sizes, as the families' own configs have them.
LARGE = {"qwen3_next": True, "granitemoehybrid": True, "jamba": False, "deepseek_v32": False}
MORE_LARGE = {"bamba": True, "olmo_hybrid": True, "falcon_mamba": False, "nemotron_h": False}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def build_tree(config: PretrainedConfig) -> Tree:
    model, _, layers = architecture._text_tree(config, torch.float32)
    return model, layers


def logits(model: PreTrainedModel, parts: list[int]) -> torch.Tensor:
    state, forward, start = SequenceState(), StateForward(model, torch.device("cpu")), 0
    with torch.inference_mode():
        for count in parts:
            row = forward(state, IDS[start : start + count])
            start += count
    return row


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "mamba2", "falcon_h1", "minimax", "mamba", "falcon"])
def test_the_answer_is_that_of_the_checkpoint_itself(family: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    source = tiny_checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    whole = logits(model, [90])
    agree = all(
        (logits(model, parts) - whole).abs().max() < 1e-3 * whole.abs().max()
        for parts in ([64, 26], [13, 75, 2], [89, 1])
    )

    built = architecture.build(architecture.load_config(source), torch.float32)

    assert built.reads_in_parts == agree


@pytest.mark.parametrize(
    ("family", "expected"),
    [*LARGE.items(), *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_LARGE.items())],
)
def test_full_sizes_are_answered_from_a_small_copy(family: str, expected: bool) -> None:
    built = architecture.build(AutoConfig.for_model(family), torch.bfloat16)

    assert built.reads_in_parts == expected


def test_the_order_of_layers_decides_where_it_matters() -> None:
    shape = dict(tiny_models.FAMILIES["minimax"])
    answers = [
        architecture.build(AutoConfig.for_model("minimax", **(shape | {"layer_types": kinds * 2})), torch.float32)
        for kinds in (["full_attention", "linear_attention"], ["linear_attention", "full_attention"])
    ]

    assert [built.reads_in_parts for built in answers] == [True, False]


def test_a_family_that_computes_everything_again_gains_nothing_by_parts() -> None:
    built = architecture.build(AutoConfig.for_model("openai-gpt", **tiny_models.FAMILIES["openai-gpt"]), torch.float32)

    assert not built.reads_in_parts


def test_the_probe_leaves_models_and_random_numbers_as_they_were() -> None:
    shape = tiny_models.FAMILIES["qwen3_5_text"] | {"hidden_size": 128}
    torch.manual_seed(5)
    before = torch.get_rng_state()

    built = architecture.build(AutoConfig.for_model("qwen3_5_text", **shape), torch.float32)

    assert torch.equal(torch.get_rng_state(), before)
    assert all(tensor.is_meta for tensor in (*built.model.parameters(), *built.model.buffers()))
    assert built.config.num_hidden_layers == 4
    assert not any("forward" in vars(module) for module in built.model.modules())


def test_a_narrow_copy_has_the_same_modules_and_windows_that_end() -> None:
    config = AutoConfig.for_model("recurrent_gemma")
    model, layers = build_tree(config)

    tree = narrow_tree(model, layers, build_tree)
    short = None if tree is None else shortened(tree, build_tree)

    assert tree is not None
    assert short is not None
    assert [type(layer) for layer in tree[1]] == [type(layer) for layer in layers][: len(tree[1])]
    assert sum(weight.nbytes for weight in tree[0].parameters()) <= MAX_BYTES
    assert (config.attention_window_size, short[0].config.attention_window_size) == (2048, 8)


def test_seeded_weights_are_the_same_every_time() -> None:
    config = AutoConfig.for_model("mamba2", **tiny_models.FAMILIES["mamba2"])
    results = []
    for _ in range(2):
        model = build_tree(config)[0]
        give_weights(model, 3)
        results.append(logits(model, [90]))

    assert torch.equal(*results)
    assert results[0].isfinite().all()
