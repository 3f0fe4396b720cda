"""Families that exist as code of their own only: imported, streamed, and equal to their published mathematics."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lamella_engine import Engine, EngineOptions, Sampling, SequenceTokens, ShardStore, TokenLogprobs
from lamella_engine.architecture import load_config
from lamella_engine.cli import app as models
from lamella_engine.errors import CheckpointError, UnsupportedModel
from lamella_engine.importers.registry import find_import
from lamella_engine.inspection import inspect
from lamella_engine.plan_cli import app as plan
from tests.engine import packing_formats as formats
from tests.engine.engine_driver import submit_ids
from tests.engine.published_models import INNER, LAYERS, PUBLISHED, VOCABULARY
from tests.engine.shards import stored_weights

PROMPTS = [list(range(5, 10)), list(range(10, 50)), [9, 8, 7]]
RUNS_AS = {
    "QWen": ("QWen v1", "qwen2"),
    "InternLM": ("InternLM v1", "llama"),
    "InternLM without biases": ("InternLM v1", "llama"),
    "InternLM2": ("InternLM2", "llama"),
    "InternLM2 with biases, scaled": ("InternLM2", "llama"),
    "Baichuan": ("Baichuan v1", "llama"),
    "Baichuan2": ("Baichuan2", "llama"),
    "Baichuan 13B": ("Baichuan v1 13B", "smollm3"),
    "Baichuan2 13B": ("Baichuan2 13B", "smollm3"),
    "ChatGLM2": ("ChatGLM2/3", "glm"),
    "ChatGLM2 32k": ("ChatGLM2/3", "glm"),
    "ChatGLM3 32k": ("ChatGLM2/3", "glm"),
    "ChatGLM without groups": ("ChatGLM2/3", "glm"),
}
PLANTED = "from pathlib import Path\nPath(__file__).with_name('ran').write_text('code of the repository was run')\n"


def _options(store: Path) -> EngineOptions:
    return EngineOptions(store=store, device="cpu", sweep_tokens=16, ram=0, max_sequences=3, offline=True)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_streamed_logits_and_tokens_equal_the_published_mathematics(variant: str, tmp_path: Path) -> None:
    published = PUBLISHED[variant]
    source = published.save(tmp_path / "source")
    expected = [published.greedy(prompt, 8) for prompt in PROMPTS]

    with Engine.open(source, _options(tmp_path / "store")) as engine:
        found = _greedy_together(engine)

    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert any(len(set(tokens)) > 3 for tokens, _ in expected), "text that never changes proves little"
    for (_, streamed), (_, wanted) in zip(found, expected, strict=True):
        torch.testing.assert_close(streamed, wanted, rtol=0, atol=1e-5)


def _greedy_together(engine: Engine) -> list[tuple[list[int], torch.Tensor]]:
    """Tokens of PROMPTS in one batch, and all log-probabilities that each was chosen from."""
    for name, prompt in enumerate(PROMPTS):
        submit_ids(engine, str(name), prompt, Sampling(max_tokens=8, ignore_eos=True, logprobs=VOCABULARY))
    tokens: dict[str, list[int]] = {str(name): [] for name in range(len(PROMPTS))}
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in tokens}
    deadline = time.monotonic() + 40
    for batch in engine.events(poll_s=0.1):
        for event in batch.events:
            if isinstance(event, SequenceTokens) and event.logprobs is not None:
                tokens[event.sequence_id] += event.token_ids
                rows[event.sequence_id] += [_row(logprobs) for logprobs in event.logprobs]
        if all(len(found) == 8 for found in tokens.values()):
            break
        assert time.monotonic() < deadline, f"only {tokens} after 40 s"
    return [(tokens[name], torch.stack(rows[name])) for name in tokens]


def _row(logprobs: TokenLogprobs) -> torch.Tensor:
    row = torch.full((VOCABULARY,), float("nan"))
    for token, value in logprobs.top:
        row[token] = value
    return row


@pytest.mark.parametrize("variant", PUBLISHED)
def test_inspection_and_store_name_both_families(variant: str, tmp_path: Path) -> None:
    source, store = PUBLISHED[variant].save(tmp_path / "source"), ShardStore(tmp_path / "store")

    before = inspect(source, store)
    store.ensure("kept", source=source)
    after = inspect("kept", store)

    for facts in (before, after):
        assert (facts.imported_from, facts.family) == RUNS_AS[variant]
        assert facts.obstacle is None
        assert facts.num_layers == LAYERS
    assert before.size_bytes == after.size_bytes


def test_the_commands_import_inspect_and_plan(tmp_path: Path) -> None:
    source, store = PUBLISHED["QWen"].save(tmp_path / "source"), str(tmp_path / "store")
    runner = CliRunner()

    imported = runner.invoke(models, ["import", "qwen", str(source), "--store", store])
    shown = runner.invoke(models, ["inspect", "qwen", "--store", store])
    planned = runner.invoke(plan, ["qwen", "--store", store, "--device", "cpu", "--json"])

    assert "qwen is ready: 3 layers" in imported.stdout
    assert "QWen v1, runs as qwen2" in shown.stdout
    assert "64 tokens" in shown.stdout
    assert planned.exit_code == 0, planned.output


def test_the_inspect_command_tells_linear_biases(tmp_path: Path) -> None:
    source = PUBLISHED["Baichuan 13B"].save(tmp_path / "source")

    shown = CliRunner().invoke(models, ["inspect", str(source), "--store", str(tmp_path / "store")]).stdout

    assert "Baichuan v1 13B, runs as smollm3" in shown
    assert "linear biases (ALiBi)" in shown
    assert "rotary" not in shown
    assert "96 tokens" in shown


def test_code_of_the_repository_is_never_run(tmp_path: Path) -> None:
    source = PUBLISHED["InternLM2"].save(tmp_path / "source")
    for module in ("configuration_internlm2", "modeling_internlm2", "tokenization_internlm2"):
        (source / f"{module}.py").write_text(PLANTED)
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_internlm2.Tokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Tokenizer"}))

    inspect(source, ShardStore(tmp_path / "store"))
    with Engine.open(source, _options(tmp_path / "store")):
        pass

    assert not list(tmp_path.rglob("ran"))
    assert not list((tmp_path / "store").rglob("*.py"))


def test_context_ends_where_positions_would_be_rescaled(tmp_path: Path) -> None:
    published = PUBLISHED["QWen"]
    rescaled = published.save(tmp_path / "rescaled")
    plain = published.save(tmp_path / "plain", use_dynamic_ntk=False, use_logn_attn=False)
    dynamic = PUBLISHED["InternLM2"].save(tmp_path / "dynamic")

    contexts = [load_config(source).max_position_embeddings for source in (rescaled, plain, dynamic)]

    assert contexts == [64, 128, 96]


@pytest.mark.parametrize(
    ("variant", "changes", "words"),
    [
        ("ChatGLM2", {"padded_vocab_size": None, "position_encoding_2d": True}, ["ChatGLM-6B (v1)", "ChatGLM3-6B"]),
        ("ChatGLM2", {"vision_config": {"layers": 1}}, ["vision", "glm-4-9b-chat"]),
        ("ChatGLM2", {"pre_seq_len": 128}, ["pre_seq_len"]),
        ("ChatGLM2", {"quantization_bit": 4}, ["quantization_bit", "16-bit"]),
        ("ChatGLM2", {"rmsnorm": False}, ["rmsnorm"]),
        ("ChatGLM2", {"add_bias_linear": True}, ["add_bias_linear"]),
        ("ChatGLM3 32k", {"_name_or_path": "mine"}, ["rope_ratio", "_name_or_path"]),
        ("ChatGLM2", {"architectures": ["ChatGLMForSequenceClassification"]}, ["does not generate text"]),
        ("Baichuan2", {"max_position_embeddings": None, "hidden_size": 4096}, ["rotary", "max_position_embeddings"]),
        ("Baichuan 13B", {"_name_or_path": "mine"}, ["Baichuan-13B or Baichuan2-13B", "_name_or_path"]),
        ("Baichuan 13B", {"vocab_size": 125696}, ["Baichuan-13B or Baichuan2-13B", "125696"]),
        ("Baichuan2 13B", {"vocab_size": 64000}, ["Baichuan-13B or Baichuan2-13B", "64000"]),
        ("Baichuan2 13B", {"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ("Baichuan2", {"vocab_size": 64000}, ["Baichuan-7B or Baichuan2-7B"]),
        ("Baichuan2", {"architectures": None, "auto_map": None}, ["architectures"]),
        ("Baichuan2", {"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ("QWen", {"visual": {"layers": 1}}, ["visual"]),
        ("QWen", {"no_bias": False}, ["no_bias"]),
        ("QWen", {"rotary_pct": 0.5}, ["rotary_pct"]),
        ("QWen", {"kv_channels": 32}, ["kv_channels"]),
        ("InternLM", {"rotary": {"base": 10000, "type": "other"}}, ["rotary", "other"]),
        ("InternLM2", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["rope_scaling", "yarn"]),
        ("InternLM2", {"architectures": ["InternLM2ForRewardModel"]}, ["InternLM2ForRewardModel"]),
    ],
)
def test_a_variant_without_exact_counterpart_is_refused_before_a_shard_is_written(
    variant: str, changes: dict[str, object], words: list[str], tmp_path: Path
) -> None:
    source, store = PUBLISHED[variant].save(tmp_path / "source", **changes), ShardStore(tmp_path / "store")

    with pytest.raises(UnsupportedModel) as inspected:
        inspect(source, store)
    with pytest.raises(UnsupportedModel) as opened:
        store.ensure("kept", source=source)

    assert str(inspected.value) == str(opened.value)
    assert all(word in str(opened.value) for word in [*words, str(source)])
    assert not list(tmp_path.rglob("root.safetensors"))


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("QWen", {"num_attention_heads": 5}),
        ("QWen", {"hidden_size": "64"}),
        ("QWen", {"num_hidden_layers": 10**12}),
        ("QWen", {"layer_norm_epsilon": -1}),
        ("QWen", {"intermediate_size": 2 * INNER + 8}),
        ("InternLM", {"num_hidden_layers": None}),
        ("InternLM", {"bias": "yes"}),
        ("InternLM2", {"num_key_value_heads": 3}),
        ("InternLM2", {"num_key_value_heads": 4}),
        ("Baichuan", {"hidden_size": 32}),
        ("Baichuan 13B", {"num_attention_heads": 10**6, "hidden_size": 2 * 10**6}),
        ("Baichuan2 13B", {"model_max_length": None}),
        ("ChatGLM2", {"multi_query_group_num": 3}),
        ("ChatGLM2", {"multi_query_group_num": 4}),
        ("ChatGLM2", {"num_layers": 4}),
    ],
)
def test_a_config_that_is_damaged_or_of_other_weights_is_refused(
    variant: str, changes: dict[str, object], tmp_path: Path
) -> None:
    source = PUBLISHED[variant].save(tmp_path / "source", **changes)

    with pytest.raises(CheckpointError, match=r"[Ff]etch|do not belong together"):
        ShardStore(tmp_path / "store").ensure("kept", source=source)

    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_a_family_is_known_by_its_class_where_no_type_is_named(tmp_path: Path) -> None:
    by_class = PUBLISHED["InternLM2"].save(tmp_path / "class", model_type=None)
    by_map = PUBLISHED["InternLM2"].save(tmp_path / "map", model_type=None, architectures=None)

    assert [load_config(source).model_type for source in (by_class, by_map)] == ["llama", "llama"]


def test_a_native_checkpoint_with_leftover_code_names_is_not_imported(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert find_import(tmp_path) is None


def test_weights_are_stored_in_the_dtype_asked_for(tmp_path: Path) -> None:
    source = PUBLISHED["Baichuan2"].save(tmp_path / "source")

    sharded = ShardStore(tmp_path / "store").ensure("kept", source=source, dtype="bfloat16")

    head = stored_weights(sharded)["lm_head.weight"]
    assert head.dtype is torch.bfloat16
    torch.testing.assert_close(head.float().norm(dim=-1), torch.ones(VOCABULARY), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("variant", "settings", "pack"),
    [
        ("QWen", {"quant_method": "gptq", "bits": 4, "group_size": 16}, partial(formats.gptq, bits=4, size=16)),
        ("InternLM2", {"quant_method": "awq", "bits": 4, "group_size": 32}, partial(formats.awq, size=32)),
    ],
)
def test_packed_weights_are_expanded_before_they_are_cut(
    variant: str, settings: formats.Settings, pack: Callable[[torch.Tensor], formats.Packed], tmp_path: Path
) -> None:
    source = PUBLISHED[variant].save(tmp_path / "source")
    packed = formats.repack(
        source, tmp_path / "packed", settings | {"desc_act": False, "zero_point": True, "version": "gemm"}, pack,
        dtype=torch.float16, chosen=lambda name, tensor: tensor.dim() == 2 and bool(re.search(r"[.]\d+[.]", name)),
    )  # fmt: skip
    store = ShardStore(tmp_path / "store")

    found, plain = (
        stored_weights(store.ensure(path.name, source=path)) for path in (packed, formats.plain_twin(packed))
    )

    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert find_import(store.build_directory(store.manifest("packed"))) is None
