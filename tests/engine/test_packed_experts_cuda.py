"""On a GPU: packed experts are fetched one by one, kept, and expanded on the card; what can be recorded still is."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamella_engine import Engine, EngineOptions, ShardStore
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import built_for, open_sweep_model
from lamella_engine.placement import ExpertRoom, Tier
from lamella_engine.reserve import device_bytes
from lamella_engine.shard import ShardedModel
from lamella_engine.stored_form import StoredForm
from tests import tiny_models
from tests.engine.engine_driver import full_load_tokens, generate, open_smallest
from tests.engine.expanded_models import expected_tokens
from tests.engine.test_experts import MANY, PROMPTS
from tests.engine.test_packed_cuda import open_at as open_packed_at
from tests.engine.test_packed_experts import GREEDY, TEN, alone, experts_of, together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CUDA = torch.device("cuda", 0)
CASES = [
    ("mixtral", "nf4"),
    ("mixtral", "lossless"),
    ("qwen3_moe", "int8,layers.1.mlp.experts.down_proj=full,layers.2=fp4"),
    ("gpt_oss", "nf4,gate_up_proj_bias=int8"),
    ("deepseek_v3", "nf4,layers.2=full"),
]
GROUPED_KERNEL = (9, 10)  # major compute capabilities on which a bfloat16 mixture can be recorded

Model = tuple[ShardedModel, list[list[int]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Model]:
    """Shards of a family with sixteen experts, packed, and the tokens of the expanded weights, all in float32."""
    return functools.cache(lambda family, quant: build(tmp_path_factory.mktemp(family), family, quant))


def build(root: Path, family: str, quant: str) -> Model:
    is_exact = quant == "lossless"
    shape, dtype = {**tiny_models.FAMILIES[family], **MANY}, torch.bfloat16 if is_exact else torch.float32
    source = tiny_models.save_checkpoint(root / "source", family, shape, dtype=dtype)
    if is_exact:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
        model = model.eval().to(CUDA)
        expected = [full_load_tokens(model, prompt, GREEDY.max_tokens) for prompt in PROMPTS]
    else:
        expected = expected_tokens(source, quant, PROMPTS, GREEDY.max_tokens, CUDA)
    return ShardStore(root / "store").ensure("tiny", source=source, form=StoredForm(quant=quant)), expected


def options_for(sharded: ShardedModel, place: str) -> EngineOptions:
    return EngineOptions(
        store=sharded.directory, max_sequences=4, sweep_tokens=64, kv_tokens=512, dtype="float32",
        ram=0 if place == "disk" else "auto",
    )  # fmt: skip


@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize(("family", "quant"), CASES)
def test_tokens_are_those_of_the_expanded_weights_and_only_visited_experts_are_moved(
    family: str, quant: str, place: str, models: Callable[[str, str], Model]
) -> None:
    sharded, expected = models(family, quant)
    own, total = experts_of(sharded), sum(shard.nbytes for shard in sharded.layers)
    visited = total - sum((each.count - 2) * each.expert_bytes for each in own)

    with open_smallest(sharded, options_for(sharded, place)) as engine:
        assert {layer.tier for layer in engine.plan.layers} == {Tier(place)}
        assert alone(engine) == expected
        assert together(engine) == expected
        generate(engine, [5], TEN)
        before = engine.counters()
        generate(engine, [5], TEN)
        after = engine.counters()
        head = engine.plan.head.nbytes if engine.plan.head.num_blocks else 0

    moved = after.ram_bytes - before.ram_bytes if place == "ram" else after.disk_bytes - before.disk_bytes
    assert after.experts_visited - before.experts_visited == 10 * 2 * len(own)
    assert 10 * visited <= moved - 10 * head <= 10 * visited + 10 * 256 * 4


@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize("quant", ["nf4", "lossless"])
def test_packed_experts_are_kept_on_the_card(quant: str, place: str, models: Callable[[str, str], Model]) -> None:
    sharded, expected = models("mixtral", quant)

    with open_with_room(sharded, options_for(sharded, place), 9) as engine:
        alone(engine)
        before = engine.counters()
        assert alone(engine) == expected
        after = engine.counters()
        assert together(engine) == expected

    assert after.experts_in_vram > before.experts_in_vram
    assert (after.experts_in_ram > before.experts_in_ram) == (place == "disk")


def open_with_room(sharded: ShardedModel, options: EngineOptions, entries: int) -> Engine:
    """The smallest engine there can be, with room for so many experts on the card; for layers on disk thrice in RAM."""
    with open_smallest(sharded, options) as engine:
        plan = engine.plan
    sizes = sizes_of_sharded(sharded, built_for(sharded, options, CUDA))
    assert sizes.experts is not None
    assert plan.vram is not None
    entry = max(sizes.experts.layers) // sizes.experts.count
    room = ExpertRoom(entry, entries * entry, 3 * entries * entry if options.ram == 0 else 0)
    vram = dataclasses.replace(plan.vram, budget=plan.vram.budget + device_bytes(room.vram_bytes))
    plan = dataclasses.replace(plan, experts=room, vram=vram)
    return Engine(open_sweep_model(sharded, options, CUDA, None, plan), None, options)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_layers_that_stay_packed_expand_what_is_visited(quant: str, models: Callable[[str, str], Model]) -> None:
    sharded, expected = models("mixtral", quant)

    with open_packed_at("packed", sharded, sharded.directory) as engine:
        assert engine.plan.keeps_packed
        assert {layer.tier for layer in engine.plan.layers} == {Tier.VRAM}
        assert alone(engine) == expected
        assert together(engine) == expected


def test_a_mixture_that_cannot_be_recorded_leaves_no_memory_behind(models: Callable[[str, str], Model]) -> None:
    sharded, expected = models("mixtral", "nf4")
    options = options_for(sharded, "ram")
    generate_and_close(sharded, options)  # what libraries and kernels keep for the process
    before = reserved()

    tokens = generate_and_close(sharded, options)

    assert tokens == expected
    assert reserved() <= before


def generate_and_close(sharded: ShardedModel, options: EngineOptions) -> list[list[int]]:
    """Tokens of an engine with all layers on the card, in float32, whose experts torch has no kernel for."""
    with Engine.open_sharded(sharded, CUDA, options) as engine:
        assert {layer.tier for layer in engine.plan.layers} == {Tier.VRAM}
        tokens = alone(engine)
        assert engine.model._graphs.is_enabled, "no recording was tried that fails"
        assert engine.model._graphs.num_graphs == 0
    return tokens


def reserved() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(CUDA)


def test_a_mixture_in_bfloat16_is_recorded_where_torch_has_the_kernel(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability(CUDA)[0] not in GROUPED_KERNEL:
        pytest.skip("torch has no grouped product for this card")
    shape = {**tiny_models.FAMILIES["mixtral"], **MANY}
    source = tiny_models.save_checkpoint(tmp_path / "source", "mixtral", shape, dtype=torch.bfloat16)
    options = EngineOptions(store=tmp_path / "store", device="cuda", max_sequences=4, sweep_tokens=64, kv_tokens=512)

    with Engine.open(source, options) as engine:
        first = alone(engine)
        again = alone(engine)
        num_graphs, is_enabled = engine.model._graphs.num_graphs, engine.model._graphs.is_enabled

    assert is_enabled
    assert num_graphs > 0
    assert again == first
