"""The module tree without weights computes in the types that transformers would load it in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamella_engine import architecture


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_types_equal_those_of_a_full_load(
    family: str, dtype: torch.dtype, tiny_checkpoint: Callable[[str], Path]
) -> None:
    source = tiny_checkpoint(family)
    full = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)

    built = architecture.build(architecture.load_config(source), dtype)

    expected = {name: tensor.dtype for name, tensor in full.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in built.model.state_dict().items()} == expected
