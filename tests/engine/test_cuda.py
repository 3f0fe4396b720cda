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
from lamella_engine.errors import PlanError
from lamella_engine.host_memory import pinned_bytes
from lamella_engine.placement import Tier
from lamella_engine.shard import ShardedModel
from tests import tiny_models
from tests.engine.engine_driver import gather, generate, open_smallest, submit_ids

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
    assert graphs(engine) > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "deepseek_v3", "qwen3_moe", "mistral", "gpt2", "phi"])
@pytest.mark.parametrize("place", ["resident", "ram", "disk"])
def test_families_equal_a_full_load_wherever_their_layers_are(
    family: str, place: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    expected = full_load(source, "cuda")
    sharded = ShardStore(tmp_path).ensure("tiny", source=source)
    options = EngineOptions(store=tmp_path, sweep_tokens=16, ram=0 if place == "disk" else "auto")

    with open_at(place, sharded, options) as engine:
        tiers = {layer.tier for layer in engine.plan.layers}
        alone = [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS]

        assert tiers == {Tier.VRAM if place == "resident" else Tier(place)}
        assert alone == expected
        assert batch(engine) == expected


def open_at(place: str, sharded: ShardedModel, options: EngineOptions) -> Engine:
    if place == "resident":
        return Engine.open_sharded(sharded, torch.device("cuda", 0), options)
    return open_smallest(sharded, options)


def graphs(engine: Engine) -> int:
    return engine.model._graphs.num_graphs


@pytest.mark.parametrize("place", ["resident", "ram", "disk"])
def test_weights_stored_in_half_compute_in_float32(place: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    expected = full_load(tmp_path / "half", "cuda")
    sharded = ShardStore(tmp_path / "store").ensure("half", source=tmp_path / "half")
    options = EngineOptions(store=tmp_path, dtype="float32", sweep_tokens=32, ram=0 if place == "disk" else "auto")

    with open_at(place, sharded, options) as engine:
        assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
        assert batch(engine) == expected


def test_random_draws_are_those_of_the_cpu(engine: Engine, tiny_llama_dir: Path, tmp_path: Path) -> None:
    sampling = Sampling(max_tokens=16, temperature=1.0, top_p=0.9, seed=5, ignore_eos=True)

    with Engine.open(tiny_llama_dir, EngineOptions(store=tmp_path, device="cpu")) as cpu:
        assert batch(engine, sampling) == batch(cpu, sampling)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShardedModel]:
    root = tmp_path_factory.mktemp("large")
    source = tiny_models.save_checkpoint(root / "source", "llama", LARGE, std=0.02)
    return source, ShardStore(root / "store").ensure("large", source=source)


@pytest.mark.parametrize(("vram", "ram"), [("1GiB", "1GiB"), ("1GiB", 0), ("600MiB", "auto"), ("2GiB", "700MiB")])
def test_budgets_are_hard_and_tokens_those_of_a_full_load(
    vram: str, ram: str | int, large: tuple[Path, ShardedModel], tmp_path: Path
) -> None:
    source, sharded = large
    expected = full_load(source, "cuda")
    options = EngineOptions(store=tmp_path, vram=vram, ram=ram, kv_tokens=512)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()

    with Engine.open_sharded(sharded, torch.device("cuda", 0), options) as engine:
        tokens = batch(engine)
        plan, pinned = engine.plan, pinned_bytes()

    assert tokens == expected
    assert plan.vram is not None
    assert torch.cuda.max_memory_reserved() - before <= plan.vram.budget
    assert pinned <= plan.ram.budget
    assert sharded.size_bytes > 1.2 * plan.vram.budget


def test_more_device_memory_is_never_slower(large: tuple[Path, ShardedModel], tmp_path: Path) -> None:
    _, sharded = large
    seconds = []

    for share in (0.3, 0.6, 1.5):
        vram = int(sharded.size_bytes * share)
        options = EngineOptions(store=tmp_path, vram=vram, kv_tokens=512)
        with Engine.open_sharded(sharded, torch.device("cuda", 0), options) as engine:
            generate(engine, PROMPTS[0], GREEDY)
            before = engine.counters().sweep_s
            generate(engine, PROMPTS[0], GREEDY)
            seconds.append(engine.counters().sweep_s - before)

    assert seconds[1] < 0.8 * seconds[0]
    assert seconds[2] < 0.5 * seconds[1]


def test_a_card_that_cannot_hold_a_layer_is_refused(large: tuple[Path, ShardedModel], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not fit a vram budget"):
        Engine.open_sharded(large[1], torch.device("cuda", 0), EngineOptions(store=tmp_path, vram="128MiB"))


def test_an_engine_within_the_cap_of_its_process_needs_no_more(
    large: tuple[Path, ShardedModel], tmp_path: Path
) -> None:
    with memory_cap(CAP_BYTES):
        options = EngineOptions(store=tmp_path, kv_tokens=512)
        with Engine.open_sharded(large[1], torch.device("cuda", 0), options) as engine:
            assert len(generate(engine, PROMPTS[1], GREEDY).token_ids) == 16


def test_a_failed_sweep_leaves_the_engine_clean(tiny_llama_dir: Path, tmp_path: Path) -> None:
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_llama_dir)
    path = sharded.layers[2].path
    whole, status = path.read_bytes(), path.stat()

    with open_smallest(sharded, EngineOptions(store=tmp_path, ram=0)) as engine:
        before = generate(engine, PROMPTS[1], GREEDY).token_ids
        submit_ids(engine, "victim", PROMPTS[0], Sampling(max_tokens=400, ignore_eos=True))
        os.truncate(path, 4096)
        failed = gather(engine, {"victim"})["victim"].finished
        with path.open("r+b") as file:
            file.write(whole)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if the disk had failed for a moment
        after = generate(engine, PROMPTS[1], GREEDY).token_ids

    assert failed is not None
    assert failed.reason is FinishReason.ERROR
    assert after == before


@pytest.mark.parametrize("place", ["resident", "ram"])
def test_close_gives_the_memory_back_though_somebody_holds_the_engine(
    place: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_llama_dir)
    gc.collect()
    before = torch.cuda.memory_allocated()

    with open_at(place, sharded, EngineOptions(store=tmp_path)) as engine:
        generate(engine, PROMPTS[0], GREEDY)
        assert torch.cuda.memory_allocated() > before

    assert torch.cuda.memory_allocated() <= before
    assert not engine.counters().running
