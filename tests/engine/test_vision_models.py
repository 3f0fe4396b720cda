"""Checkpoints of models that also see: their text model runs, exactly, and nothing else of them is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from lamella_engine import Engine, EngineOptions, Sampling, ShardStore
from lamella_engine.inspection import inspect
from tests import tiny_models
from tests.engine.engine_driver import full_load_tokens, gather, submit_ids

_TEXT = {**tiny_models.FAMILIES["qwen3"]}
_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_SIGHT: dict[str, object] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "embed_dim": 32,
}  # fmt: skip
MODELS: dict[str, dict[str, object]] = {
    "gemma3": {"text_config": _TEXT | {"sliding_window": 8}, "vision_config": _SIGHT, "mm_tokens_per_image": 4},
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _SIGHT | {"model_type": "pixtral", "head_dim": 16},
    },
    "qwen2_5_vl": {"text_config": _TEXT | _ROTARY, "vision_config": _SIGHT | {"fullatt_block_indexes": [1]}},
    "qwen3_vl": {
        "text_config": _TEXT | _ROTARY,
        "vision_config": _SIGHT | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "llama4": {
        "text_config": tiny_models.FAMILIES["llama4_text"],
        "vision_config": _SIGHT | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
    },
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _SIGHT | {"model_type": "clip_vision_model"},
    },
}
PROMPTS = [[5, 9, 13, 40, 41, 42], list(range(40, 70)), [7]]


def save_model(family: str, directory: Path) -> None:
    """Write a tiny seeded checkpoint of `family`, one of `MODELS`."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **MODELS[family]), dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.tie_weights()
    model.generation_config = GenerationConfig()
    model.save_pretrained(directory)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", list(MODELS))
def test_text_is_that_of_a_full_load_and_nothing_that_sees_is_stored(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path / "source")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "source", attn_implementation="eager").eval()
    expected = [full_load_tokens(whole, prompt, 8) for prompt in PROMPTS]

    with Engine.open(tmp_path / "source", EngineOptions(store=tmp_path / "store", device="cpu")) as engine:
        for name, prompt in enumerate(PROMPTS):
            submit_ids(engine, str(name), prompt, Sampling(max_tokens=8, ignore_eos=True))
        outcomes = gather(engine, {str(name) for name in range(len(PROMPTS))})
    facts = inspect(tmp_path / "source", ShardStore(tmp_path / "store"))

    assert [outcomes[str(name)].token_ids for name in range(len(PROMPTS))] == expected
    seeing = sum(weight.numel() for name, weight in whole.named_parameters() if "vision" in name or "visual" in name)
    assert seeing > 0
    assert facts.parameters <= sum(weight.numel() for weight in whole.parameters()) - seeing
