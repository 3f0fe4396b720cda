"""What a model is and what would fit where, told from config and headers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lamella_engine import architecture
from lamella_engine.attention import IMPLEMENTATION, sweep_attention
from lamella_engine.errors import CheckpointError, ModelError, ModelNotFound
from lamella_engine.inspection import CARD_RESERVE_BYTES, GIB, CardFit, inspect, kv_bytes_per_token
from lamella_engine.kv_cache import KVCache
from lamella_engine.packing import PackedSweep, Span
from lamella_engine.shard_store import ShardStore
from tests import tiny_models
from tests.engine.fake_hub import serve_hub

# Grouped heads, one head, several widths, latent attention, fused projections, learned positions.
KV_FAMILIES = [
    "llama",
    "mistral",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "phi3",
    "deepseek_v3",
    "gpt2",
    "opt",
]
LLAMA = tiny_models.FAMILIES["llama"]
TWO_WIDTHS = {
    "hidden_size_per_layer_input": 0, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "global_head_dim": 32, "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128,
    "vocab_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 0, "sliding_window": 8,
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "store")


def config_of(family: str, **changed: object) -> PretrainedConfig:
    return AutoConfig.for_model(family, **{**tiny_models.FAMILIES.get(family, {}), **changed})


def cached_bytes_per_token(config: PretrainedConfig) -> int:
    """What a packed sweep really stores for one token, in float32."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.set_attn_implementation(IMPLEMENTATION)
    text = model.config.get_text_config()
    cache = KVCache(16, torch.device("cpu"))
    table = cache.open_table(4)
    assert table is not None
    slots = table.slots
    pack = PackedSweep([Span([5, 6, 7], 0, slots)], torch.device("cpu"))
    windows = architecture.sliding_windows(text, text.num_hidden_layers)
    with torch.inference_mode(), sweep_attention(pack, cache, windows):
        model(input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False)
    stored = (cache.load(layer, slots[:1]) for layer in range(text.num_hidden_layers))
    return sum(keys.nbytes + values.nbytes for keys, values in stored)


@pytest.mark.parametrize("family", KV_FAMILIES)
def test_key_value_bytes_are_what_a_sweep_stores(family: str) -> None:
    config = config_of(family)

    told = kv_bytes_per_token(config, torch.float32)

    assert told == cached_bytes_per_token(config)
    assert kv_bytes_per_token(config, torch.bfloat16) == told // 2


def test_key_value_bytes_follow_widths_that_differ_between_layers() -> None:
    config = config_of("gemma4_text", **TWO_WIDTHS)

    told = kv_bytes_per_token(config, torch.float32)

    assert told == cached_bytes_per_token(config)
    assert told == 2 * (2 * (16 + 16) * 4) + 2 * (2 * (32 + 32) * 4)


def test_key_value_bytes_of_a_nested_text_model() -> None:
    text = config_of("gemma3_text")
    nested = AutoConfig.for_model("gemma3", text_config=text.to_dict())

    assert kv_bytes_per_token(nested, torch.float32) == kv_bytes_per_token(text, torch.float32)


def test_a_directory_is_described_exactly(tiny_llama_dir: Path, store: ShardStore) -> None:
    with safe_open(tiny_llama_dir / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping

    facts = inspect(tiny_llama_dir, store)

    in_layers = {name: tensor for name, tensor in tensors.items() if ".layers." in name}
    assert (facts.found_in, facts.family, facts.dtype, facts.obstacle) == ("path", "llama", "float32", None)
    assert facts.layers_bytes == sum(tensor.nbytes for tensor in in_layers.values())
    assert facts.layer_bytes_min == facts.layer_bytes_max == facts.layers_bytes // facts.num_layers
    assert facts.size_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert facts.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert (facts.num_layers, facts.hidden_size, facts.attention_heads) == (4, 64, 4)
    assert (facts.kv_heads, facts.key_widths, facts.value_widths) == ((2,), (16,), (16,))
    assert (facts.context_length, facts.sliding_window) == (tiny_models.CONTEXT_TOKENS, None)
    assert facts.kv_bytes_per_token == 4 * 2 * (16 + 16) * 4
    assert not facts.tied_embeddings
    assert not store.root.exists()


def test_the_store_says_what_the_directory_says(tiny_llama_dir: Path, store: ShardStore) -> None:
    from_path = inspect(str(tiny_llama_dir), store)
    store.ensure("tiny", source=tiny_llama_dir)

    stored = inspect("tiny", store)

    assert stored.found_in == "store"
    # A shard's data may hold padding between tensors.
    assert 0 <= stored.layers_bytes - from_path.layers_bytes < 64 * 64
    for name in ("family", "dtype", "parameters", "num_layers", "kv_bytes_per_token", "kv_heads", "vocabulary"):
        assert getattr(stored, name) == getattr(from_path, name), name


def test_a_stored_model_comes_before_a_directory_of_its_name(
    tiny_llama_dir: Path, store: ShardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.ensure("tiny", source=tiny_llama_dir)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)

    assert inspect("tiny", store).found_in == "store"


def test_tied_embeddings_count_once(store: ShardStore, tmp_path: Path) -> None:
    source = tiny_models.save_checkpoint(tmp_path / "tied", "llama", LLAMA | {"tie_word_embeddings": True})

    facts = inspect(source, store)

    assert facts.tied_embeddings
    assert facts.root_bytes == (128 * 64 + 64) * 4


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt2"])
def test_fused_and_renamed_weights_are_counted_as_stored(
    family: str, tiny_checkpoint: Callable[[str], Path], store: ShardStore
) -> None:
    source = tiny_checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(source)

    facts = inspect(source, store)

    counts = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}  # tied weights share one
    assert facts.parameters == sum(counts.values())


def test_the_dtype_of_most_bytes_is_told(store: ShardStore, tmp_path: Path) -> None:
    source = tiny_models.save_checkpoint(tmp_path / "half", "llama", LLAMA, dtype=torch.bfloat16)
    path = source / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    save_file({name: t.float() if t.dim() == 1 else t for name, t in tensors.items()}, path, {"format": "pt"})

    facts = inspect(source, store)

    assert facts.dtype == "bfloat16"
    assert facts.size_bytes == sum(t.numel() * (4 if t.dim() == 1 else 2) for t in tensors.values())


def test_a_recurrent_family_tells_its_state_and_what_grows(
    tiny_checkpoint: Callable[[str], Path], store: ShardStore
) -> None:
    recurrent = inspect(tiny_checkpoint("mamba2"), store)
    mixed = inspect(tiny_checkpoint("qwen3_5_text"), store)

    assert (recurrent.obstacle, mixed.obstacle) == (None, None)
    assert recurrent.kv_bytes_per_token == 0
    assert recurrent.state_bytes >= 4 * (8 * 16 * 16 * 4)  # layers; heads, head width, state width, float32
    num_full = 1  # of the four layers
    assert mixed.kv_bytes_per_token == num_full * 2 * (16 + 16) * 4
    assert mixed.state_bytes > 0


def test_a_family_that_cannot_run_is_described_with_the_obstacle(
    tiny_checkpoint: Callable[[str], Path], store: ShardStore
) -> None:
    facts = inspect(tiny_checkpoint("zamba"), store)

    assert facts.family == "zamba"
    assert facts.obstacle is not None
    assert "zamba" in facts.obstacle
    assert facts.cards == ()
    assert facts.num_layers == 6


def test_a_70b_model_streams_on_a_small_card(
    store: ShardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
        "dtype": "float16",
    }  # fmt: skip
    with serve_hub(tmp_path, monkeypatch) as hub:
        commit = hub.add("owner/big", {"config.json": json.dumps(shape).encode()})

        facts = inspect("owner/big", store)

    assert (facts.found_in, facts.revision, facts.dtype) == ("hub", commit, "float16")
    assert facts.parameters == pytest.approx(69e9, rel=0.01)
    assert facts.kv_bytes_per_token == 80 * 2 * 8 * 128 * 2
    fits = {card.card_bytes // GIB: card for card in facts.cards}
    assert fits[4] == CardFit(4 * GIB, True, 0)
    assert fits[8].runs
    resident = [card.resident_layers for card in facts.cards]
    assert resident == sorted(resident)
    assert 0 < fits[24].resident_layers < 80
    table_bytes = 32000 * 8192 * 2
    room = 24 * GIB - CARD_RESERVE_BYTES - (facts.root_bytes - table_bytes) - 2048 * facts.kv_bytes_per_token
    workspace_share = (24 * GIB - CARD_RESERVE_BYTES) // 16
    most = room // facts.layer_bytes_max - 2
    assert (room - workspace_share) // facts.layer_bytes_max - 3 <= fits[24].resident_layers <= most


def test_a_small_model_fits_every_card_whole(tiny_llama_dir: Path, store: ShardStore) -> None:
    facts = inspect(tiny_llama_dir, store)

    assert [card.card_bytes // GIB for card in facts.cards] == [4, 6, 8, 12, 24]
    assert all(card.runs and card.resident_layers == 4 for card in facts.cards)


def test_a_quantised_model_on_the_hub_is_described_with_the_obstacle(
    store: ShardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("llama").to_dict() | {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    with serve_hub(tmp_path, monkeypatch) as hub:
        hub.add("owner/quantised", {"config.json": json.dumps(config).encode()})

        facts = inspect("owner/quantised", store)

    assert facts.obstacle is not None
    assert "quantised" in facts.obstacle


def test_what_is_nowhere_is_not_found(store: ShardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(tmp_path, monkeypatch), pytest.raises(ModelNotFound):
        inspect("owner/nothing", store)
    with pytest.raises(ModelNotFound):
        inspect(tmp_path / "nothing", store)
    with pytest.raises(ModelError):
        inspect("./nothing", store)


def test_a_truncated_checkpoint_is_refused(tiny_llama_dir: Path, store: ShardStore, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama_dir, broken)
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(1000)

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        inspect(broken, store)


@pytest.mark.real_model
def test_a_gguf_file_is_described_as_it_would_be_stored(smollm2_gguf: Path, store: ShardStore) -> None:
    facts = inspect(smollm2_gguf, store)

    assert (facts.family, facts.dtype, facts.num_layers) == ("llama", "float32", 30)
    assert facts.parameters == 134_515_008
    assert facts.size_bytes == 4 * facts.parameters
    assert facts.tied_embeddings
