"""A model in figures: the same from a checkpoint as from the shards built of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lamella_engine import architecture
from lamella_engine.model_sizes import sizes_of_sharded, sizes_of_source
from lamella_engine.model_source import find_model
from lamella_engine.placement import ModelSizes
from lamella_engine.shard_store import ShardStore
from tests import tiny_models


def built_and_not(source: Path, root: Path) -> tuple[ModelSizes, ModelSizes]:
    """Sizes from the checkpoint, and from the store after building, under one name."""
    store = ShardStore(root)
    planned = sizes_of_source(find_model(source, store))
    sharded = store.ensure("model", source=source)
    tree = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    built = sizes_of_sharded(sharded, tree)
    assert sizes_of_source(find_model("model", store)) == built
    return replace(planned, name="model"), built


@pytest.mark.parametrize(
    "family", ["llama", "qwen3_moe", "deepseek_v3", "gpt2", "opt", "gemma3_text", "gpt_oss", "phi"]
)
def test_a_checkpoint_is_as_large_as_its_shards_will_be(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    planned, built = built_and_not(tiny_checkpoint(family), tmp_path / "store")

    assert planned == built
    assert built.expansion == 1.0
    assert built.other > 0
    assert built.embedding > 0
    assert built.head_bytes >= built.vocabulary * built.hidden_size * 4


def test_every_byte_is_counted_once(tiny_llama_dir: Path, tmp_path: Path) -> None:
    sharded = ShardStore(tmp_path / "store").ensure("tiny", source=tiny_llama_dir)
    tree = architecture.build(architecture.load_config(sharded.directory), torch.float32)

    sizes = sizes_of_sharded(sharded, tree)

    assert sizes.layers == tuple(shard.nbytes for shard in sharded.layers)
    assert sizes.embedding + sizes.head + sizes.other == sharded.root.nbytes
    assert sizes.active_parameters == (sum(sizes.layers) + sizes.head) // 4
    assert sizes.context_length == tiny_models.CONTEXT_TOKENS


def test_a_tied_table_is_the_head(tmp_path: Path) -> None:
    shape = tiny_models.FAMILIES["llama"] | {"tie_word_embeddings": True}
    source = tiny_models.save_checkpoint(tmp_path / "tied", "llama", shape)

    _, sizes = built_and_not(source, tmp_path / "store")

    assert sizes.is_tied
    assert sizes.head == 0
    assert sizes.head_bytes == sizes.embedding == 128 * 64 * 4


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 0.5), (torch.float32, 1.0)])
def test_another_compute_type_changes_what_layers_expand_to(
    dtype: torch.dtype, factor: float, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    source = find_model(tiny_llama_dir, ShardStore(tmp_path / "store"))

    stored, computed = sizes_of_source(source), sizes_of_source(source, dtype)

    assert computed.layers == stored.layers
    assert computed.expansion == factor
    assert computed.kv_bytes_per_token == stored.kv_bytes_per_token * factor
    assert computed.itemsize == dtype.itemsize


def test_a_token_meets_only_the_experts_it_is_routed_to(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    sizes = sizes_of_source(find_model(tiny_checkpoint("qwen3_moe"), ShardStore(tmp_path / "store")))

    experts = 4 * 4 * 3 * 64 * 32  # layers, experts, projections
    dense = (sum(sizes.layers) + sizes.head) // 4 - experts
    assert sizes.active_parameters == dense + experts // 2
    assert sizes.intermediate_size == 2 * (32 + 64 // 2) + 32  # two routed experts with their rows, a shared one
