"""Families of every kind: streamed, exact, alone and together, by the path that their modules allow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamella_engine import Engine, EngineOptions, Sampling
from lamella_engine.errors import UnsupportedModel
from tests.engine.engine_driver import full_load_tokens, gather, submit_ids

# One of each trait: grouped heads, sliding windows, soft caps, sinks, latent attention, fused experts, parallel
# blocks, learned positions, fused projections, several attentions a block.
PACKED = [
    "llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "phi3",
    "cohere2", "nemotron", "gpt2", "opt", "glm4_moe", "longcat_flash",
]  # fmt: skip
# Attention of their own (biases by distance, no position ids, chunks, dynamic masks, two softmaxes), recurrent states
# in a cache, beside attention, in the modules themselves, in a form of their own, and nothing kept at all.
STEPWISE = [
    "falcon", "bloom", "stablelm", "llama4_text", "doge", "diffllama", "qwen3_next", "qwen3_5_text", "mamba", "mamba2",
    "bamba", "falcon_h1", "recurrent_gemma", "rwkv", "openai-gpt",
]  # fmt: skip
PROMPTS = [list(range(5, 10)), list(range(10, 50)), [9, 8, 7]]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "path"), [*((f, "packed") for f in PACKED), *((f, "stepwise") for f in STEPWISE)])
def test_sweeps_equal_a_full_load(
    family: str, path: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    expected = [full_load_tokens(model, prompt, 10) for prompt in PROMPTS]

    with Engine.open(source, EngineOptions(store=tmp_path, device="cpu", sweep_tokens=64, ram=0)) as engine:
        for name, prompt in enumerate(PROMPTS):
            submit_ids(engine, str(name), prompt, Sampling(max_tokens=10, ignore_eos=True))
        outcomes = gather(engine, {str(name) for name in range(len(PROMPTS))})

        assert [outcomes[str(name)].token_ids for name in range(len(PROMPTS))] == expected
        assert engine.model.path == path


@pytest.mark.parametrize("family", ["llama", "falcon", "llama4_text"])
def test_a_prompt_read_in_parts_equals_a_full_load(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    expected = [full_load_tokens(model, prompt, 10) for prompt in PROMPTS]

    with Engine.open(source, EngineOptions(store=tmp_path, device="cpu", sweep_tokens=16)) as engine:
        for name, prompt in enumerate(PROMPTS):
            submit_ids(engine, str(name), prompt, Sampling(max_tokens=10, ignore_eos=True))
        outcomes = gather(engine, {str(name) for name in range(len(PROMPTS))})

    assert [outcomes[str(name)].token_ids for name in range(len(PROMPTS))] == expected


@pytest.mark.parametrize(("family", "reason"), [("zamba", "shares weights"), ("bert", "both sides")])
def test_a_family_that_cannot_run_is_refused_before_a_shard_is_written(
    family: str, reason: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)

    with pytest.raises(UnsupportedModel, match=f"{family}.*{reason}.*llama"):
        Engine.open(source, EngineOptions(store=tmp_path, device="cpu"))

    assert not list(tmp_path.rglob("*.safetensors"))
