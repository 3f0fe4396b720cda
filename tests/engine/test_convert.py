"""From checkpoint names to native weights: bit for bit as transformers loads them, or an error that says why not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lamella_engine import ShardStore
from lamella_engine.errors import CheckpointError, UnsupportedModel
from tests import tiny_models
from tests.engine.shards import stored_weights


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_stored_weights_equal_a_full_load(family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_checkpoint(family)

    model = ShardStore(tmp_path).ensure(family, source=source)

    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = {name: value for name, value in full.state_dict().items() if name not in full.all_tied_weights_keys}
    stored = stored_weights(model)
    assert stored.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(stored[name], value)] == []
    assert len(model.layers) == 4


def _edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the single-file checkpoint `source` whose tensors went through `edit`."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def _set_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_missing_weight_is_named_and_nothing_is_written(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source = _edited(tiny_llama_dir, tmp_path / "source", lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))  # type: ignore[arg-type, return-value] # what pop returns does not matter

    with pytest.raises(CheckpointError, match=r"lacks 1 of .*model\.layers\.2\.mlp\.up_proj\.weight"):
        ShardStore(tmp_path / "store").ensure("tiny", source=source)

    assert not list((tmp_path / "store").rglob("*.safetensors"))
    assert ShardStore(tmp_path / "store").list() == ()


def test_a_missing_expert_is_an_error(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    source = _edited(tiny_checkpoint("mixtral"), tmp_path / "source", lambda t: t.pop(name))  # type: ignore[arg-type, return-value] # what pop returns does not matter

    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        ShardStore(tmp_path / "store").ensure("tiny", source=source)


def test_a_weight_of_another_shape_is_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 130)

    source = _edited(tiny_llama_dir, tmp_path / "source", widen)

    with pytest.raises(CheckpointError, match=r"down_proj\.weight' has shape \[64, 130\].*\[64, 128\]"):
        ShardStore(tmp_path / "store").ensure("tiny", source=source)


def test_a_config_of_another_size_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source = _edited(tiny_llama_dir, tmp_path / "source", lambda tensors: None)
    _set_config(source, num_hidden_layers=5)

    with pytest.raises(CheckpointError, match=r"model\.layers\.4"):
        ShardStore(tmp_path / "store").ensure("tiny", source=source)


@pytest.mark.parametrize("layers", [0, -1, 10**9, "four", None, 2.5])
def test_an_absurd_number_of_layers_is_refused_at_once(layers: object, tiny_llama_dir: Path, tmp_path: Path) -> None:
    source = _edited(tiny_llama_dir, tmp_path / "source", lambda tensors: None)
    _set_config(source, num_hidden_layers=layers)

    with pytest.raises((CheckpointError, UnsupportedModel)):
        ShardStore(tmp_path / "store").ensure("tiny", source=source)


def test_tensors_the_model_does_not_have_are_left_out_and_told(
    tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["value_head.weight"] = torch.zeros(8)

    source = _edited(tiny_llama_dir, tmp_path / "source", add)

    with caplog.at_level(logging.WARNING):
        model = ShardStore(tmp_path / "store").ensure("tiny", source=source)

    assert "value_head.weight" not in stored_weights(model)
    assert "value_head.weight" in caplog.text
    assert "inv_freq" not in caplog.text


def test_tied_weights_are_stored_once(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = _edited(tiny_checkpoint("gemma"), tmp_path / "source", add_head)

    model = ShardStore(tmp_path / "store").ensure("tiny", source=source)

    assert {spec.name for spec in model.root.tensors} == {"model.embed_tokens.weight", "model.norm.weight"}


def test_a_head_stored_in_place_of_its_tied_embedding_is_used(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    source = _edited(tiny_checkpoint("gemma"), tmp_path / "source", swap)

    model = ShardStore(tmp_path / "store").ensure("tiny", source=source)

    original = load_file(tiny_checkpoint("gemma") / "model.safetensors")
    assert torch.equal(stored_weights(model)["model.embed_tokens.weight"], original["model.embed_tokens.weight"])


def test_a_head_that_differs_from_its_tied_embedding_is_kept_as_in_a_full_load(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    source = _edited(tiny_checkpoint("gemma"), tmp_path / "source", add_head)

    model = ShardStore(tmp_path / "store").ensure("tiny", source=source)

    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert torch.equal(stored_weights(model)["lm_head.weight"], full.lm_head.weight)
    assert json.loads((model.directory / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_stored_in_the_dtype_asked_for(
    dtype: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("mixtral")

    model = ShardStore(tmp_path).ensure("tiny", source=source, dtype=dtype)

    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    stored = stored_weights(model)
    assert model.dtype == dtype
    assert all(torch.equal(value, full[name].to(getattr(torch, dtype))) for name, value in stored.items())


def test_each_weight_keeps_its_own_dtype_by_default(tmp_path: Path) -> None:
    source = tiny_models.save_family("llama", tmp_path / "bf16", dtype=torch.bfloat16)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    model = ShardStore(tmp_path / "store").ensure("tiny", source=_edited(source, tmp_path / "mixed", widen))

    dtypes = {name: value.dtype for name, value in stored_weights(model).items()}
    assert model.dtype == "bfloat16"
    assert dtypes.pop("model.norm.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_a_quantised_checkpoint_is_refused_before_a_shard_is_written(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source = _edited(tiny_llama_dir, tmp_path / "source", lambda tensors: None)
    _set_config(source, quantization_config={"quant_method": "quip"})

    with pytest.raises(UnsupportedModel, match="quantised with 'quip'; read are awq"):
        ShardStore(tmp_path / "store").ensure("tiny", source=source)

    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_eight_bit_floats_without_scales_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    source = _edited(tiny_llama_dir, tmp_path / "source", shrink)

    with pytest.raises(UnsupportedModel, match="float8_e4m3fn"):
        ShardStore(tmp_path / "store").ensure("tiny", source=source)


@pytest.mark.parametrize("family", ["bert", "zamba"])
def test_an_unsupported_family_is_refused_before_a_shard_is_written(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=family):
        ShardStore(tmp_path).ensure("tiny", source=tiny_checkpoint(family))

    assert not list(tmp_path.rglob("*.safetensors"))
