"""Quantised checkpoints give the logits and tokens of the values that they stand for, format by format."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lamella_engine import Engine, EngineOptions, Sampling, SequenceFinished, SequenceTokens, ShardStore
from lamella_engine.cli import app
from lamella_engine.errors import UnsupportedModel
from lamella_engine.inspection import inspect
from tests import tiny_models
from tests.engine import packing_formats as formats
from tests.engine.engine_driver import submit_ids
from tests.engine.fake_hub import serve_hub
from tests.engine.packing_formats import Packed, Settings, plain_twin, repack
from tests.engine.shards import stored_weights

PROMPTS = {"a": [5, 6, 7, 8, 9], "b": list(range(10, 40)), "c": [9, 8, 7]}
Pack = Callable[[torch.Tensor], Packed]
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def _compressed(layout: str, weights: Settings, **more: object) -> Settings:
    group = {"targets": ["Linear"], "weights": weights, **more}
    return {
        "quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }  # fmt: skip


FP8: Settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 40]}
GPTQ: Settings = {"quant_method": "gptq", "desc_act": False, "sym": False, "checkpoint_format": "gptq"}
FLOAT_8: Settings = {"num_bits": 8, "type": "float", "symmetric": True}
DYNAMIC: Settings = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
WHOLE: Settings = {"type": "int", "strategy": "group", "group_size": 32}

CASES: dict[str, tuple[Settings, Pack, torch.dtype]] = {
    "fp8-blocks": (FP8, partial(formats.fp8_blocks, rows=24, columns=40), BF16),
    "fp8-tensor": (
        FP8 | {"weight_block_size": None, "activation_scheme": "static"},
        partial(formats.fp8_tensor, scale="weight_scale_inv", shape=()), BF16,
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, partial(formats.fp8_rows, scale="weight_scale"), BF16),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        partial(formats.fp8_tensor, scale="weight_scale", shape=(), dtype=F32), BF16,
    ),
    "float-tensor": (
        _compressed("float-quantized", FLOAT_8 | {"strategy": "tensor"}, input_activations=DYNAMIC),
        partial(formats.fp8_tensor, scale="weight_scale", shape=(1,), dtype=BF16), BF16,
    ),
    "float-channel": (
        _compressed("float-quantized", FLOAT_8 | {"strategy": "channel"}, input_activations=DYNAMIC),
        partial(formats.fp8_rows, scale="weight_scale", dtype=BF16), BF16,
    ),
    "float-block": (
        _compressed("float-quantized", FLOAT_8 | {"strategy": "block", "block_structure": [24, 40]}),
        partial(formats.fp8_blocks, rows=24, columns=40, scale="weight_scale"), BF16,
    ),
    "packed-int4": (
        _compressed("pack-quantized", WHOLE | {"num_bits": 4, "symmetric": True}),
        partial(formats.packed_whole, bits=4, size=32, symmetric=True, dtype=BF16), BF16,
    ),
    "packed-int4-zeros": (
        _compressed("pack-quantized", WHOLE | {"num_bits": 4, "symmetric": False}),
        partial(formats.packed_whole, bits=4, size=32, symmetric=False, dtype=BF16), BF16,
    ),
    "packed-int3": (
        _compressed("pack-quantized", WHOLE | {"num_bits": 3, "symmetric": False}),
        partial(formats.packed_whole, bits=3, size=32, symmetric=False, dtype=F16), F16,
    ),
    "packed-int8": (
        _compressed("pack-quantized", WHOLE | {"num_bits": 8, "symmetric": True}),
        partial(formats.packed_whole, bits=8, size=32, symmetric=True, dtype=F32), BF16,
    ),
    **{
        f"gptq-{bits}": (GPTQ | {"bits": bits, "group_size": 16}, partial(formats.gptq, bits=bits, size=16), F16)
        for bits in (2, 3, 4, 8)
    },
    "gptq-act-order": (
        GPTQ | {"bits": 4, "group_size": 16, "desc_act": True},
        partial(formats.gptq, bits=4, size=16, act_order=True), F16,
    ),
    "gptq-v2": (
        GPTQ | {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        partial(formats.gptq, bits=4, size=32, first_version=False), BF16,
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        partial(formats.awq, size=32), F16,
    ),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        partial(formats.bnb_4bit, nested=False), BF16,
    ),
    "nf4-nested": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        partial(formats.bnb_4bit, nested=True, nested_block=32), BF16,
    ),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, formats.bnb_8bit, F16),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_packed_weights_are_stored_as_what_they_stand_for(case: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings, pack, dtype = CASES[case]
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings, pack, dtype=dtype)

    store = ShardStore(tmp_path / "store")
    built = stored_weights(store.ensure("packed", source=packed))

    expected = load_file(plain_twin(packed) / "model.safetensors")
    assert built.keys() == expected.keys()
    differing = [name for name in expected if not _equal(built[name], expected[name])]
    assert not differing
    assert store.manifest("packed").dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("case", ["fp8-blocks", "packed-int4-zeros", "gptq-act-order", "awq", "nf4-nested", "int8"])
def test_tokens_and_logits_are_those_of_a_full_load(case: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings, pack, dtype = CASES[case]
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings, pack, dtype=dtype)

    assert_runs_as_full_load(packed, plain_twin(packed), tmp_path / "store")


@pytest.mark.parametrize("case", ["fp8-blocks", "awq"])
def test_experts_that_arrive_one_by_one_are_expanded_and_fused(
    case: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    settings, pack, dtype = CASES[case]
    source = tiny_checkpoint("qwen3_moe")
    packed = repack(source, tmp_path / "packed", settings, pack, dtype=dtype)

    assert_runs_as_full_load(packed, plain_twin(packed), tmp_path / "store")


def test_mxfp4_experts_run_as_a_full_load(tmp_path: Path) -> None:
    shape = tiny_models.FAMILIES["gpt_oss"]
    source = tiny_models.save_checkpoint(tmp_path / "source", "gpt_oss", shape, dtype=BF16)
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    _pack_experts(source, packed, plain)

    assert_runs_as_full_load(packed, plain, tmp_path / "store")


@pytest.mark.parametrize("case", ["fp8-square-blocks", "fp8-tensor"])
def test_float8_expands_to_what_transformers_itself_makes_of_it(
    case: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    square = (FP8 | {"weight_block_size": [32, 32]}, partial(formats.fp8_blocks, rows=32, columns=32), BF16)
    settings, pack, _ = square if case == "fp8-square-blocks" else CASES[case]
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings, pack)

    _assert_equal_to_transformers(packed, tmp_path / "store")


def test_mxfp4_expands_to_what_transformers_itself_makes_of_it(tmp_path: Path) -> None:
    shape = tiny_models.FAMILIES["gpt_oss"]
    source = tiny_models.save_checkpoint(tmp_path / "source", "gpt_oss", shape, dtype=BF16)
    _pack_experts(source, tmp_path / "packed", tmp_path / "plain")

    _assert_equal_to_transformers(tmp_path / "packed", tmp_path / "store")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_expand_to_what_bitsandbytes_itself_makes_of_them(
    kind: str, nested: bool, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def pack(weight: torch.Tensor) -> Packed:
        data, state = functional.quantize_4bit(weight.to(BF16), quant_type=kind, compress_statistics=nested)
        parts = {f"weight.{end}": part for end, part in state.as_dict(packed=True).items()}
        return Packed({"weight": data} | parts, functional.dequantize_4bit(data, state))

    settings: Settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings, pack)

    built = stored_weights(ShardStore(tmp_path / "store").ensure("packed", source=packed))

    expected = load_file(plain_twin(packed) / "model.safetensors")
    assert all(_equal(built[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", ["fp8-blocks", "packed-int4-zeros", "gptq-3", "awq", "nf4-nested", "int8"])
def test_what_is_said_before_building_is_what_is_built(case: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings, pack, dtype = CASES[case]
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings, pack, dtype=dtype)
    store = ShardStore(tmp_path / "store")

    facts, plain = inspect(packed, store), inspect(plain_twin(packed), store)
    store.ensure("packed", source=packed)
    built = inspect("packed", store)

    assert facts.packing is not None
    assert plain.packing is None
    for other in (plain, built):
        assert (facts.dtype, facts.parameters, facts.layers_bytes, facts.root_bytes, facts.cards) == (
            other.dtype, other.parameters, other.layers_bytes, other.root_bytes, other.cards,
        )  # fmt: skip


def test_inspect_and_list_tell_what_arrives_and_what_is_stored(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings, pack, dtype = CASES["awq"]
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings, pack, dtype=dtype)
    store = ["--store", str(tmp_path / "store")]

    before = CliRunner().invoke(app, ["inspect", str(packed), *store])
    imported = CliRunner().invoke(app, ["import", "packed", str(packed), *store])
    listed = CliRunner().invoke(app, ["list", *store])

    assert "float16, expanded from awq, 4 bits, groups of 32" in before.output
    assert "packed is ready: 4 layers, float16" in imported.output
    assert "float16" in listed.output


def test_a_packed_model_on_the_hub_is_described_by_its_config(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, pack, dtype = CASES["fp8-blocks"]
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings, pack, dtype=dtype)
    store = ShardStore(tmp_path / "store")
    with serve_hub(tmp_path, monkeypatch) as hub:
        hub.add_directory("owner/packed", packed)

        facts, local = inspect("owner/packed", store), inspect(packed, store)
        built = store.ensure("owner/packed")

    assert facts.packing == local.packing == "fp8 in blocks of 24x40"
    assert facts.obstacle is None
    assert (facts.dtype, facts.size_bytes) == (local.dtype, local.size_bytes)
    assert built.dtype == "bfloat16"


def test_a_packing_that_is_not_read_is_refused_before_it_is_fetched(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, pack, dtype = CASES["gptq-4"]
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings | {"bits": 5}, pack, dtype=dtype)
    with serve_hub(tmp_path, monkeypatch) as hub:
        hub.add_directory("owner/packed", packed)

        with pytest.raises(UnsupportedModel, match="5 bits"):
            ShardStore(tmp_path / "store").ensure("owner/packed")
        obstacle = inspect("owner/packed", ShardStore(tmp_path / "store")).obstacle

    assert obstacle is not None
    assert "5 bits" in obstacle
    assert hub.fetched_files == {"config.json"}


def test_a_mixed_checkpoint_takes_each_scheme_where_it_belongs(tiny_llama_dir: Path, tmp_path: Path) -> None:
    groups = {
        "attention": {"targets": ["re:.*self_attn.*"], "format": "float-quantized",
                      "weights": FLOAT_8 | {"strategy": "channel"}},
        "rest": {"targets": ["Linear"], "format": "pack-quantized", "weights": WHOLE | {"num_bits": 4}},
    }  # fmt: skip
    settings: Settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    attention = repack(
        tiny_llama_dir, tmp_path / "half", None, partial(formats.fp8_rows, scale="weight_scale", dtype=BF16),
        chosen=lambda name, _: "self_attn" in name,
    )  # fmt: skip
    whole = partial(formats.packed_whole, bits=4, size=32, symmetric=True, dtype=BF16)
    packed = repack(
        attention, tmp_path / "packed", settings, whole, chosen=lambda name, _: name.endswith("_proj.weight") and
        ".mlp." in name,
    )  # fmt: skip
    # What `repack` leaves alone it casts: put the float8 tensors of the first step back.
    first, second = (load_file(directory / "model.safetensors") for directory in (attention, packed))
    save_file(second | {name: first[name] for name in first if "self_attn" in name}, packed / "model.safetensors")

    built = stored_weights(ShardStore(tmp_path / "store").ensure("packed", source=packed))

    float8, whole_numbers = (load_file(plain_twin(path) / "model.safetensors") for path in (attention, packed))
    assert all(_equal(built[name], float8[name]) for name in float8 if "self_attn" in name)
    assert all(_equal(built[name], whole_numbers[name]) for name in float8 if ".mlp." in name)


def test_settings_may_lie_beside_the_config_as_early_tools_wrote_them(tiny_llama_dir: Path, tmp_path: Path) -> None:
    packed = repack(tiny_llama_dir, tmp_path / "packed", None, partial(formats.gptq, bits=4, size=16), dtype=F16)
    (packed / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16, "desc_act": False}))

    built = stored_weights(ShardStore(tmp_path / "store").ensure("packed", source=packed))

    expected = load_file(plain_twin(packed) / "model.safetensors")
    assert all(_equal(built[name], expected[name]) for name in expected)


def test_a_type_that_is_asked_for_is_expanded_to_directly(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings, pack, _ = CASES["gptq-4"]
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings, pack, dtype=BF16)
    exact = repack(tiny_llama_dir, tmp_path / "exact", settings, pack, dtype=F32)

    built = stored_weights(ShardStore(tmp_path / "store").ensure("packed", source=packed, dtype="float32"))

    expected = load_file(plain_twin(exact) / "model.safetensors")
    names = [name for name in expected if name.endswith("_proj.weight")]
    assert all(_equal(built[name], expected[name]) for name in names)


def test_the_stored_config_says_what_the_shards_hold(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings, pack, dtype = CASES["awq"]
    packed = repack(tiny_llama_dir, tmp_path / "packed", settings, pack, dtype=dtype)

    model = ShardStore(tmp_path / "store").ensure("packed", source=packed)

    config = json.loads((model.directory / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"


def assert_runs_as_full_load(packed: Path, plain: Path, store: Path) -> None:
    """Greedy tokens and their log-probabilities equal those of `plain` loaded by transformers, in float32."""
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    options = EngineOptions(store=store, device="cpu", ram=0, dtype="float32")
    with Engine.open(packed, options) as engine:
        for name, prompt in PROMPTS.items():
            submit_ids(engine, name, prompt, Sampling(max_tokens=8, ignore_eos=True, logprobs=0))
        steps = _steps(engine)
    for name, prompt in PROMPTS.items():
        tokens, logprobs = zip(*steps[name], strict=True)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        assert list(tokens) == logits.argmax(-1).tolist()
        expected = logits.log_softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)


def _steps(engine: Engine) -> dict[str, list[tuple[int, float]]]:
    """Each sequence's tokens with the logarithms of their probabilities, to the end of all of PROMPTS."""
    steps: dict[str, list[tuple[int, float]]] = {name: [] for name in PROMPTS}
    pending = set(PROMPTS)
    deadline = time.monotonic() + 40.0
    for batch in engine.events(poll_s=0.1):
        for event in batch.events:
            if isinstance(event, SequenceTokens):
                assert event.logprobs is not None
                steps[event.sequence_id] += zip(event.token_ids, (item.logprob for item in event.logprobs), strict=True)
            elif isinstance(event, SequenceFinished):
                pending.discard(event.sequence_id)
        if not pending:
            return steps
        assert time.monotonic() < deadline, f"{pending} did not end"
    raise AssertionError("the engine was closed")


def _assert_equal_to_transformers(packed: Path, store: Path) -> None:
    built = stored_weights(ShardStore(store).ensure("packed", source=packed))
    loaded = AutoModelForCausalLM.from_pretrained(packed, dtype=BF16).state_dict()
    assert built.keys() == loaded.keys()
    assert all(torch.equal(built[name], loaded[name].to(built[name].dtype)) for name in built)


def _pack_experts(source: Path, packed: Path, plain: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    packed_tensors, plain_tensors = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        packed_tensors[name] = plain_tensors[name] = tensor
        if tensor.dim() == 3:
            blocks, scales, value = formats.mxfp4(tensor.float())
            del packed_tensors[name]
            packed_tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain_tensors[name] = value.to(BF16).contiguous()
    told = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    for directory, tensors, more in ((packed, packed_tensors, told), (plain, plain_tensors, {})):
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config | more))


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)
