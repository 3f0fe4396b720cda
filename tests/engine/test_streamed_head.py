"""A head that passes by in row blocks, rows of an embedding fetched as they are needed, and weights of another type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.slow_machine import MACHINES, slow_machine
from lamella_engine import Engine, EngineOptions, Sampling, ShardStore, architecture
from lamella_engine.embedding_rows import EmbeddingRows, PlainTable
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import open_sweep_model
from lamella_engine.placement import HeadPlacement, Tier
from lamella_engine.planner import make_plan
from lamella_engine.shard import ShardedModel
from lamella_engine.timeline import Timeline
from tests import tiny_models
from tests.engine.engine_driver import gather, generate, submit_ids

CPU = torch.device("cpu")
FAST = 0.001  # of a machine's slowness: what is metered shall not limit
PROMPTS = [[5, 9, 13], list(range(40, 90)), [7], list(range(100, 117))]
GREEDY = Sampling(max_tokens=10, ignore_eos=True)
LETTERS = {"v": Tier.VRAM, "r": Tier.RAM, "d": Tier.DISK}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def open_streaming(
    sharded: ShardedModel, tiers: str, head: tuple[Tier, int] | None, embedding: Tier, dtype: str | None = None
) -> Engine:
    """An engine on a metered machine, its layers as `tiers` says, its head in so many blocks from that tier."""
    options = EngineOptions(
        store=sharded.directory, device="cpu", dtype=dtype, max_sequences=8, sweep_tokens=64, kv_tokens=1024
    )
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    sizes = sizes_of_sharded(sharded, built)
    machine = slow_machine(MACHINES[0], FAST, vram=2**30, ram=2**30)
    plan = make_plan(sizes, machine.request(options))
    layers = tuple(
        dataclasses.replace(place, tier=LETTERS[tiers[place.layer % len(tiers)]], nbytes=sizes.layers[place.layer])
        for place in plan.layers
    )
    place = plan.head if head is None else HeadPlacement(sizes.head_bytes, head[0], head[1])
    plan = dataclasses.replace(
        plan,
        layers=layers,
        head=place,
        embedding=embedding,
        device_slots=2,
        slot_bytes=max(*sizes.layers, sizes.head_bytes),
        ring_bytes=8 * 2**20,
    )
    return Engine(open_sweep_model(sharded, options, CPU, machine, plan), None, options)


def full_load(source: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    answers = []
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=GREEDY.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def batch(engine: Engine) -> list[list[int]]:
    names = [str(index) for index in range(len(PROMPTS))]
    for name, prompt in zip(names, PROMPTS, strict=True):
        submit_ids(engine, name, prompt, GREEDY)
    outcomes = gather(engine, set(names))
    return [outcomes[name].token_ids for name in names]


def save(directory: Path, family: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A checkpoint with an odd number of rows in its tables, so that blocks of them are uneven and begin anywhere."""
    shape = tiny_models.FAMILIES[family] | {"vocab_size": 149} | changes
    return tiny_models.save_checkpoint(directory, family, shape, dtype=dtype)


# Tied with scaled embeddings and a soft cap, untied with a bias, tied and untied without.
@pytest.mark.parametrize(
    ("family", "is_tied"), [("gemma2", True), ("phi", False), ("llama", True), ("llama", False), ("gpt2", True)]
)
@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
@pytest.mark.parametrize("num_blocks", [1, 7])
def test_a_head_in_blocks_gives_the_tokens_of_a_full_load(
    family: str, is_tied: bool, tier: Tier, num_blocks: int, tmp_path: Path
) -> None:
    source = save(tmp_path / "source", family, tie_word_embeddings=is_tied)
    sharded = ShardStore(tmp_path / "store").ensure("tiny", source=source)
    expected = full_load(source)

    with open_streaming(sharded, "vrd", (tier, num_blocks), Tier.DISK) as engine:
        assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
        assert batch(engine) == expected


@pytest.mark.parametrize("family", ["phi", "gemma2", "llama"])
@pytest.mark.parametrize(("tier", "tiers"), [(Tier.RAM, "r"), (Tier.DISK, "d"), (Tier.DISK, "v")])
def test_weights_in_half_precision_compute_in_float32(family: str, tier: Tier, tiers: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", family, torch.bfloat16)
    sharded = ShardStore(tmp_path / "store").ensure("tiny", source=source)
    expected = full_load(source)

    with open_streaming(sharded, tiers, (tier, 5), Tier.DISK, dtype="float32") as engine:
        assert batch(engine) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("ram", [0, "auto"])
def test_a_cpu_converts_half_precision_wherever_the_layers_are(family: str, ram: int | str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", family, torch.bfloat16)
    sharded = ShardStore(tmp_path / "store").ensure("tiny", source=source)
    expected = full_load(source)
    options = EngineOptions(store=tmp_path, device="cpu", dtype="float32", ram=ram, kv_tokens=1024, sweep_tokens=64)

    with Engine.open_sharded(sharded, CPU, options) as engine:
        tiers = {place.tier for place in engine.plan.layers}
        tokens = batch(engine)

    assert tiers == {Tier.DISK if ram == 0 else Tier.RAM}
    assert tokens == expected


@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_the_bytes_of_a_streamed_head_and_of_embedding_rows_are_counted(
    tier: Tier, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_checkpoint("llama"))
    layers = sum(shard.nbytes for shard in sharded.layers)
    head, row = 128 * 64 * 4, 64 * 4

    with open_streaming(sharded, "v", (tier, 3), tier) as engine:
        before = engine.counters()
        tokens = generate(engine, [5, 9, 5], Sampling(max_tokens=4, ignore_eos=True)).token_ids
        after = engine.counters()

    rows = 2 + len(tokens[:-1])  # of the prompt two different ones
    moved = {"disk": after.disk_bytes - before.disk_bytes, "ram": after.ram_bytes - before.ram_bytes}
    other = "ram" if tier is Tier.DISK else "disk"
    assert moved == {str(tier): 4 * head + rows * row, other: 0}
    assert after.vram_bytes - before.vram_bytes == 4 * layers


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_rows_are_what_the_whole_table_gives(family: str, dtype: torch.dtype) -> None:
    config = AutoConfig.for_model(family, **tiny_models.FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    embedding: nn.Embedding = model.get_input_embeddings()
    table = torch.randn(embedding.weight.shape).to(dtype)
    embedding.weight.data.copy_(table)
    ids = torch.tensor([[0, 3, 127, 3, 0, 64]])  # the padding token among them
    expected = embedding(ids).detach()
    timeline = Timeline()

    EmbeddingRows(embedding, PlainTable(table), CPU, timeline, tier=Tier.DISK)

    with torch.inference_mode():
        assert torch.equal(embedding(ids), expected)
        assert torch.equal(embedding(ids[:, :1]), expected[:, :1])
    assert timeline.totals().disk_bytes == (4 + 1) * table[0].nbytes
