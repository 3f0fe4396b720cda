"""Families with every kind of attention and expert layout: streamed in packed sweeps, exact, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamella_engine import Engine, EngineOptions, Sampling
from lamella_engine.errors import UnsupportedModel
from tests.engine.engine_driver import gather, submit_ids

# One of each trait: grouped heads, sliding windows, soft caps, sinks, latent attention, fused experts, parallel
# blocks, learned positions, fused projections.
FAMILIES = [
    "llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "phi3",
    "cohere2", "nemotron", "gpt2", "opt", "glm4_moe",
]  # fmt: skip
PROMPTS = [list(range(5, 10)), list(range(10, 50)), [9, 8, 7]]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sweeps_equal_a_full_load(family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    expected = [_greedy(model, prompt) for prompt in PROMPTS]

    with Engine.open(source, EngineOptions(store=tmp_path, device="cpu", sweep_tokens=16, ram=0)) as engine:
        for name, prompt in enumerate(PROMPTS):
            submit_ids(engine, str(name), prompt, Sampling(max_tokens=10, ignore_eos=True))
        outcomes = gather(engine, {str(name) for name in range(len(PROMPTS))})

    assert [outcomes[str(name)].token_ids for name in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("family", ["qwen3_next", "bloom", "falcon"])
def test_a_family_that_cannot_run_is_refused_before_a_shard_is_written(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)

    with pytest.raises(UnsupportedModel, match=family):
        Engine.open(source, EngineOptions(store=tmp_path, device="cpu"))

    assert not list(tmp_path.rglob("*.safetensors"))


def _greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    output = model.generate(  # type: ignore[operator] # transformers leaves it without types
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens
