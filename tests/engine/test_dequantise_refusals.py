"""Quantised checkpoints that are not understood, or do not fit together, are refused before a shard is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella_engine import ShardStore
from lamella_engine.errors import CheckpointError, UnsupportedModel
from tests.engine import packing_formats as formats
from tests.engine.packing_formats import Packed, Settings, repack

GPTQ: Settings = {"quant_method": "gptq", "bits": 4, "group_size": 16}
AWQ: Settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
FP8: Settings = {"quant_method": "fp8", "weight_block_size": [24, 40]}
NF4: Settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
INT8: Settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
PACK_GPTQ = partial(formats.gptq, bits=4, size=16)
PACK_AWQ = partial(formats.awq, size=32)
PACK_FP8 = partial(formats.fp8_blocks, rows=24, columns=40)
PACK_NF4 = partial(formats.bnb_4bit, nested=True)


def _compressed(group: Settings, **more: object) -> Settings:
    weights: Settings = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    whole: Settings = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": whole | group}, **more}


WHOLE: Settings = _compressed({})
PACK_WHOLE = partial(formats.packed_whole, bits=4, size=32, symmetric=True, dtype=torch.bfloat16)

SETTINGS: dict[str, tuple[Settings, Callable[[torch.Tensor], Packed], str]] = {
    "unknown": ({"quant_method": "quip"}, PACK_GPTQ, "quantised with 'quip'; read are awq"),
    "unnamed": ({}, PACK_GPTQ, "a method that it does not name"),
    "method-no-text": ({"quant_method": 3}, PACK_GPTQ, "'quant_method' is 3, not text"),
    "gptq-bits": (GPTQ | {"bits": 5}, PACK_GPTQ, "5 bits, GPTQ is read with 2, 3, 4, 8"),
    "gptq-no-bits": (GPTQ | {"bits": "four"}, PACK_GPTQ, "'bits' is 'four', not a whole number"),
    "gptq-group": (GPTQ | {"group_size": 0}, PACK_GPTQ, "group_size is 0"),
    "gptq-marlin": (GPTQ | {"checkpoint_format": "marlin"}, PACK_GPTQ, "layout is 'marlin'"),
    "gptq-dynamic": (GPTQ | {"dynamic": {"+:.*q_proj": {"bits": 8}}}, PACK_GPTQ, "groups of their own"),
    "awq-bits": (AWQ | {"bits": 8}, PACK_AWQ, "8 bits, AWQ is read with 4"),
    "awq-layout": (AWQ | {"version": "GEMV"}, PACK_AWQ, "layout is 'gemv'"),
    "awq-zeros": (AWQ | {"zero_point": False}, PACK_AWQ, "without zero points"),
    "fp8-blocks": (FP8 | {"weight_block_size": [128]}, PACK_FP8, "not two positive numbers"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, PACK_FP8, "only FP8 is read"),
    "whole-activations": (
        _compressed({"input_activations": {"num_bits": 8, "type": "int", "dynamic": True}}), PACK_WHOLE,
        "input activations are rounded to int8 while it runs, without which it would not be exact",
    ),
    "transforms": (_compressed({}, transform_config={"config_groups": {"u": {}}}), PACK_WHOLE, "transformed while it"),
    "sparse": (_compressed({}, sparsity_config={"format": "sparse-24-bitmask"}), PACK_WHOLE, "stored sparse"),
    "nvfp4": (_compressed({"format": "nvfp4-pack-quantized"}), PACK_WHOLE, "format is 'nvfp4-pack-quantized'"),
    "no-group-for-it": (_compressed({"targets": ["re:.*vision.*"]}), PACK_WHOLE, "none of its config_groups is for"),
    "broken-pattern": (_compressed({"targets": ["re:("]}), PACK_WHOLE, "not a pattern"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_read_are_refused_with_the_reason(
    case: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    settings, pack, reason = SETTINGS[case]
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings, pack)

    with pytest.raises(UnsupportedModel) as refusal:
        ShardStore(tmp_path / "store").ensure("packed", source=packed)

    assert reason in str(refusal.value)
    assert str(packed) in str(refusal.value)
    assert not list(tmp_path.glob("store/**/*.safetensors"))


Tensors = dict[str, torch.Tensor]
PATH = "model.layers.1.mlp.up_proj."


def _drop(name: str, tensors: Tensors) -> None:
    del tensors[PATH + name]


def _reshape(name: str, tensors: Tensors) -> None:
    tensors[PATH + name] = tensors[PATH + name][:-1].contiguous()


def _set(name: str, value: torch.Tensor, tensors: Tensors) -> None:
    tensors[PATH + name] = value


HARMS: dict[str, tuple[Settings, Callable[[torch.Tensor], Packed], Callable[[Tensors], None], str]] = {
    "fp8-no-scale": (FP8, PACK_FP8, partial(_drop, "weight_scale_inv"), "belongs to no weight"),
    "fp8-no-weight": (FP8, PACK_FP8, partial(_drop, "weight"), "weight_scale_inv"),
    "fp8-grid": (FP8, PACK_FP8, partial(_reshape, "weight_scale_inv"), "do not fit it"),
    "fp8-scale-type": (FP8, PACK_FP8, partial(_set, "weight_scale_inv", torch.ones(1, dtype=torch.int32)), "int32"),
    "gptq-scales": (GPTQ, PACK_GPTQ, partial(_drop, "scales"), "lacks"),
    "gptq-zeros": (GPTQ, PACK_GPTQ, partial(_reshape, "qzeros"), "do not fit together"),
    "gptq-groups": (GPTQ | {"group_size": 128}, PACK_GPTQ, lambda tensors: None, "do not fit together"),
    "gptq-bits": (GPTQ | {"bits": 8}, PACK_GPTQ, lambda tensors: None, "do not fit together"),
    "gptq-twice": (GPTQ, PACK_GPTQ, partial(_set, "weight", torch.ones(2)), "twice, packed and plain"),
    "awq-group": (AWQ | {"group_size": 48}, PACK_AWQ, lambda tensors: None, "in groups of 48"),
    "awq-scales": (AWQ, PACK_AWQ, partial(_reshape, "scales"), "do not fit together"),
    "whole-shape": (WHOLE, PACK_WHOLE, partial(_drop, "weight_shape"), "lacks"),
    "whole-other-shape": (WHOLE, PACK_WHOLE, partial(_set, "weight_shape", torch.tensor([128, 128])), "does not hold"),
    "whole-group": (
        _compressed({"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 48}}),
        PACK_WHOLE, lambda tensors: None, "groups of 48 do not divide",
    ),
    "nf4-maxima": (NF4, PACK_NF4, partial(_drop, "weight.absmax"), "lacks"),
    "nf4-nested": (NF4, PACK_NF4, partial(_reshape, "weight.nested_absmax"), "nested maxima"),
    "nf4-cut": (NF4, PACK_NF4, partial(_reshape, "weight"), "not packed as bitsandbytes packs"),
    "nf4-state": (
        NF4, PACK_NF4, partial(_set, "weight.quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8)),
        "not the JSON text",
    ),
    "int8-no-maxima": (INT8, formats.bnb_8bit, partial(_drop, "SCB"), "belongs to no weight"),
    "int8-layout": (
        INT8, formats.bnb_8bit, partial(_set, "weight_format", torch.tensor(2, dtype=torch.uint8)), "only rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMS)
def test_packed_tensors_that_do_not_fit_are_refused(case: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings, pack, harm, reason = HARMS[case]
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings, pack)
    tensors = load_file(packed / "model.safetensors")
    harm(tensors)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises((CheckpointError, UnsupportedModel)) as refusal:
        ShardStore(tmp_path / "store").ensure("packed", source=packed)

    assert reason in str(refusal.value)
    assert not list(tmp_path.glob("store/**/*.safetensors"))


@pytest.mark.parametrize("order", [-1, 99])
def test_an_order_of_groups_that_are_not_there_leaves_no_shards(
    order: int, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    packed = repack(tiny_llama_dir, tmp_path / "packed", GPTQ, PACK_GPTQ)
    tensors = load_file(packed / "model.safetensors")
    tensors[PATH + "g_idx"][3] = order
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match="groups that are not there"):
        ShardStore(tmp_path / "store").ensure("packed", source=packed)

    assert not list(tmp_path.glob("store/**/*.safetensors"))


def test_a_family_that_stores_projections_the_other_way_round_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    packed = repack(
        tiny_checkpoint("gpt2"), tmp_path / "packed", GPTQ, PACK_GPTQ, chosen=lambda name, _: "c_proj.weight" in name
    )

    with pytest.raises(UnsupportedModel, match="the other way round"):
        ShardStore(tmp_path / "store").ensure("packed", source=packed)


def test_settings_without_packed_weights_mean_nothing(tiny_llama_dir: Path, tmp_path: Path) -> None:
    plain = repack(tiny_llama_dir, tmp_path / "packed", FP8, PACK_FP8, chosen=lambda *_: False)

    model = ShardStore(tmp_path / "store").ensure("plain", source=plain)

    assert "quantization_config" not in json.loads((model.directory / "config.json").read_text())


def test_packed_weights_without_settings_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    packed = repack(tiny_llama_dir, tmp_path / "packed", None, PACK_GPTQ)

    with pytest.raises(CheckpointError, match=r"holds packed tensors, such as .*qweight.* says how they are packed"):
        ShardStore(tmp_path / "store").ensure("packed", source=packed)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_broken_settings_beside_the_config_are_refused(text: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    packed = repack(tiny_llama_dir, tmp_path / "packed", None, PACK_GPTQ)
    (packed / "quantize_config.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"quantize_config\.json"):
        ShardStore(tmp_path / "store").ensure("packed", source=packed)
