"""On a GPU: packed layers give the tokens of what they expand to, resident packed or expanded, from RAM and disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lamella_engine import Engine, EngineOptions, ShardStore, architecture
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.placement import Tier
from lamella_engine.shard import ShardedModel
from lamella_engine.stored_form import StoredForm
from tests import tiny_models
from tests.engine.engine_driver import generate, open_smallest
from tests.engine.expanded_models import expected_tokens
from tests.engine.test_packed_models import FAMILIES, GREEDY, PROMPTS, answers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CUDA = torch.device("cuda", 0)
# Layers of some MiB, so that four of them packed take less than one more of them expanded.
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**tiny_models.FAMILIES["llama"], **WIDE}
    return tiny_models.save_checkpoint(tmp_path_factory.mktemp("wide") / "source", "llama", config, std=0.05)


@pytest.mark.parametrize("place", ["expanded", "packed", "ram", "disk"])
@pytest.mark.parametrize("quant", ["nf4", "int8", "fp4,layers.0=bf16"])
def test_tokens_are_those_of_the_expanded_model(quant: str, place: str, wide: Path, tmp_path: Path) -> None:
    expected = expected_tokens(wide, quant, PROMPTS, GREEDY.max_tokens, CUDA)
    sharded = ShardStore(tmp_path).ensure("tiny", source=wide, form=StoredForm(quant=quant))

    with open_at(place, sharded, tmp_path) as engine:
        assert {layer.tier for layer in engine.plan.layers} == {
            Tier.VRAM if place in ("expanded", "packed") else Tier(place)
        }
        assert engine.plan.keeps_packed == (place != "expanded")
        assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
        assert answers(engine) == expected
        assert answers(engine) == expected
        assert engine.model._graphs.is_enabled


def open_at(place: str, sharded: ShardedModel, root: Path, dtype: torch.dtype = torch.float32) -> Engine:
    """With all layers on the card, expanded or packed, or all streamed from RAM or disk; `dtype` is computed in."""
    options = EngineOptions(
        store=root, max_sequences=4, sweep_tokens=64, kv_tokens=512, ram=0 if place == "disk" else "auto"
    )
    if place in ("ram", "disk"):
        return open_smallest(sharded, options)
    if place == "expanded":
        return Engine.open_sharded(sharded, CUDA, options)
    built = architecture.build(architecture.load_config(sharded.directory), dtype)
    sizes = sizes_of_sharded(sharded, built)
    with Engine.open_sharded(sharded, CUDA, options) as engine:
        assert engine.plan.vram is not None
        used = engine.plan.vram.used
    # Instead of all layers expanded all packed, one expanded, and what the allocator rounds up to.
    vram = used - sum(sizes.computed) + sum(sizes.layers) + max(sizes.computed) + 8 * 2**20
    assert vram < used
    return Engine.open_sharded(
        sharded, CUDA, EngineOptions(store=root, max_sequences=4, sweep_tokens=64, kv_tokens=512, vram=vram)
    )


@pytest.mark.parametrize("place", ["expanded", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_every_kind(
    family: str, place: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    expected = expected_tokens(source, "nf4", PROMPTS, GREEDY.max_tokens, CUDA)
    sharded = ShardStore(tmp_path).ensure("tiny", source=source, form=StoredForm(quant="nf4"))

    with open_at(place, sharded, tmp_path) as engine:
        assert answers(engine) == expected


def test_lossless_gives_the_tokens_of_the_model(tmp_path: Path) -> None:
    config = {**tiny_models.FAMILIES["llama"], **WIDE}
    source = tiny_models.save_checkpoint(tmp_path / "source", "llama", config, std=0.02)
    store = ShardStore(tmp_path / "store")
    whole = store.ensure("tiny", source=source, dtype="bfloat16")
    packed = store.ensure("tiny", form=StoredForm(quant="lossless"))

    with open_at("disk", whole, tmp_path) as first:
        expected = answers(first)
    for place in ("packed", "ram", "disk"):
        with open_at(place, packed, tmp_path, torch.bfloat16) as engine:
            assert answers(engine) == expected
