"""On a GPU: the same tokens as on the CPU, under a memory cap far below the model, and clean after failures."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamella_engine import Engine, EngineOptions, FinishReason, Sampling, ShardStore
from lamella_engine.errors import DeviceError
from tests import tiny_models
from tests.engine.engine_driver import gather, generate, submit_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

PROMPTS = [[5, 9, 13], list(range(40, 90)), [7], list(range(100, 117))]
GREEDY = Sampling(max_tokens=16, ignore_eos=True)
CAP_BYTES = 1 << 30
LARGE: dict[str, object] = {
    "vocab_size": 2048,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def engine(tiny_llama_dir: Path, tmp_path: Path) -> Iterator[Engine]:
    with Engine.open(tiny_llama_dir, EngineOptions(store=tmp_path, device="cuda", sweep_tokens=32)) as engine:
        yield engine


@contextmanager
def memory_cap(cap_bytes: int) -> Iterator[None]:
    """Let this process have `cap_bytes` of GPU memory, as on a small card."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(cap_bytes / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def full_load(source: Path, device: str) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    model = model.eval().to(device)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def batch(engine: Engine, sampling: Sampling = GREEDY) -> list[list[int]]:
    names = [str(index) for index in range(len(PROMPTS))]
    for name, prompt in zip(names, PROMPTS, strict=True):
        submit_ids(engine, name, prompt, sampling)
    outcomes = gather(engine, set(names))
    return [outcomes[name].token_ids for name in names]


def test_tokens_equal_a_full_load_alone_and_in_one_batch(engine: Engine, tiny_llama_dir: Path) -> None:
    expected = full_load(tiny_llama_dir, "cuda")

    assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
    assert batch(engine) == expected


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "deepseek_v3", "qwen3_moe", "mistral", "gpt2"])
def test_families_equal_a_full_load(family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_checkpoint(family)
    expected = full_load(source, "cuda")

    with Engine.open(source, EngineOptions(store=tmp_path, device="cuda", sweep_tokens=16)) as engine:
        assert batch(engine) == expected


def test_random_draws_are_those_of_the_cpu(engine: Engine, tiny_llama_dir: Path, tmp_path: Path) -> None:
    sampling = Sampling(max_tokens=16, temperature=1.0, top_p=0.9, seed=5, ignore_eos=True)

    with Engine.open(tiny_llama_dir, EngineOptions(store=tmp_path, device="cpu")) as cpu:
        assert batch(engine, sampling) == batch(cpu, sampling)


def test_a_model_far_above_the_memory_cap_runs_and_equals_a_full_load(tmp_path: Path) -> None:
    source = tiny_models.save_checkpoint(tmp_path / "large", "llama", LARGE, std=0.02)
    sharded = ShardStore(tmp_path / "store").ensure("large", source=source)
    layer_bytes = max(shard.nbytes for shard in sharded.layers)
    head_bytes = 2048 * 2048 * 4
    expected = full_load(source, "cuda")
    options = EngineOptions(store=tmp_path / "store", device="cuda", kv_tokens=512)

    for cap_bytes, slots in ((CAP_BYTES, 2), (layer_bytes + head_bytes + 160 * 2**20, 1)):
        with memory_cap(cap_bytes), Engine.open("large", options) as engine:
            tokens = batch(engine)

            assert tokens == expected
            assert len(engine._model._slots._slots) == slots  # type: ignore[attr-defined] # the GPU's kind of slots
            assert torch.cuda.max_memory_allocated() < cap_bytes
            assert sharded.size_bytes > 2 * cap_bytes
        del engine


def test_a_card_that_cannot_hold_a_layer_is_refused(tmp_path: Path) -> None:
    source = tiny_models.save_checkpoint(tmp_path / "large", "llama", LARGE | {"num_hidden_layers": 1}, std=0.02)

    with memory_cap(128 * 2**20), pytest.raises(DeviceError, match="largest layer"):
        Engine.open(source, EngineOptions(store=tmp_path / "store", device="cuda"))


def test_a_failed_sweep_leaves_the_engine_clean(tiny_llama_dir: Path, tmp_path: Path) -> None:
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_llama_dir)
    path = sharded.layers[2].path
    whole = path.read_bytes()

    with Engine.open("tiny", EngineOptions(store=tmp_path, device="cuda")) as engine:
        before = generate(engine, PROMPTS[1], GREEDY).token_ids
        submit_ids(engine, "victim", PROMPTS[0], Sampling(max_tokens=400, ignore_eos=True))
        os.truncate(path, 4096)
        failed = gather(engine, {"victim"})["victim"].finished
        with path.open("r+b") as file:
            file.write(whole)
        after = generate(engine, PROMPTS[1], GREEDY).token_ids

    assert failed is not None
    assert failed.reason is FinishReason.ERROR
    assert after == before


def test_close_gives_the_memory_back(tiny_llama_dir: Path, tmp_path: Path) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()

    with Engine.open(tiny_llama_dir, EngineOptions(store=tmp_path, device="cuda")) as engine:
        generate(engine, PROMPTS[0], GREEDY)
        assert torch.cuda.memory_allocated() > before
    del engine
    gc.collect()

    assert torch.cuda.memory_allocated() <= before
