"""On a GPU: several models under one budget give the tokens of a full load and keep within it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamella_engine import EngineOptions, Sampling, ShardStore
from lamella_engine.engine_group import EngineGroup
from lamella_engine.errors import PlanError
from lamella_engine.shard import ShardedModel
from tests.engine.engine_driver import full_load_tokens, gather, generate, submit_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

CUDA = torch.device("cuda", 0)
FAMILIES = ("llama", "qwen2", "mixtral")
PROMPTS = [[5, 9, 13], list(range(40, 70)), [7]]
GREEDY = Sampling(max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("place", ["resident", "ram", "disk"])
def test_models_that_share_a_card_give_the_tokens_of_a_full_load(
    place: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    models = {family: ShardStore(tmp_path).ensure(family, source=tiny_checkpoint(family)) for family in FAMILIES}
    options = EngineOptions(
        store=tmp_path, max_sequences=4, sweep_tokens=32, kv_tokens=512, ram=0 if place == "disk" else "auto"
    )
    expected = {
        family: [
            full_load_tokens(AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family)).eval().to(CUDA), prompt, 24)
            for prompt in PROMPTS
        ]
        for family in FAMILIES
    }
    gc.collect()
    torch.cuda.empty_cache()
    before, share = torch.cuda.memory_reserved(CUDA), torch.cuda.memory.get_per_process_memory_fraction(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    vram = 512 * 1024**2 if place == "resident" else _smallest(models, options)

    group = EngineGroup.open(models, CUDA, dataclasses.replace(options, vram=vram))
    with closing(group):
        for family, engine in group.engines.items():
            for index, prompt in enumerate(PROMPTS):
                submit_ids(engine, f"{family}-{index}", prompt, GREEDY)
        found = {name: gather(engine, {f"{name}-{n}" for n in range(3)}) for name, engine in group.engines.items()}
        again = {name: generate(engine, PROMPTS[1], GREEDY).token_ids for name, engine in group.engines.items()}
        assert torch.cuda.max_memory_reserved(CUDA) - before <= vram
    del group, engine

    assert {name: [found[name][f"{name}-{n}"].token_ids for n in range(3)] for name in FAMILIES} == expected
    assert again == {name: expected[name][1] for name in FAMILIES}
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(CUDA) <= before
    assert torch.cuda.memory.get_per_process_memory_fraction(CUDA) == pytest.approx(share)


def _smallest(models: dict[str, ShardedModel], options: EngineOptions) -> int:
    with pytest.raises(PlanError) as refused:
        EngineGroup.open(models, CUDA, dataclasses.replace(options, vram=1))
    return 1 + refused.value.missing_bytes
