"""The module tree without weights computes in the types that transformers would load it in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lamella_engine import architecture
from lamella_engine.errors import UnsupportedModel


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


@pytest.mark.parametrize("family", ["bart", "marian", "prophetnet"])
def test_an_encoder_with_a_decoder_is_refused(family: str) -> None:
    config = AutoConfig.for_model(family)

    with pytest.raises(UnsupportedModel, match=f"{family}.*encoder with a decoder.*llama"):
        architecture.build(config, torch.float32)


def test_a_family_that_keeps_its_past_in_an_older_form_is_refused() -> None:
    config = AutoConfig.for_model("xlnet", d_model=64, n_layer=2, n_head=4, d_inner=64, vocab_size=64)

    with pytest.raises(UnsupportedModel, match=r"xlnet.*mems"):
        architecture.build(config, torch.float32)


def test_a_rehearsal_leaves_the_model_as_it_was(tiny_checkpoint: Callable[[str], Path]) -> None:
    config = architecture.load_config(tiny_checkpoint("recurrent_gemma"))

    built = architecture.build(config, torch.float32)

    assert built.state_size is not None
    assert [bool(paths) for paths in built.state_size.in_modules] == [True, False, True, False]
    for module in built.model.modules():
        assert "forward" not in vars(module)
        assert not [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
