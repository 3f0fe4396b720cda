"""A script written for airllm runs with its import line changed; what is not effective is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamella_engine import AutoModel, GenerateOutput, SequenceError
from lamella_engine.errors import ModelNotFound, OptionError
from lamella_engine.placement import Tier


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AutoModel]:
    store = tmp_path_factory.mktemp("store")
    with AutoModel.from_pretrained(tiny_llama_dir, layer_shards_saving_path=store, device="cpu") as model:
        yield model


def test_a_script_written_for_airllm_runs(model: AutoModel) -> None:
    input_tokens = model.tokenizer(
        ["What is the capital of France?"],
        return_tensors="pt",
        return_attention_mask=False,
        truncation=True,
        max_length=128,
        padding=False,
    )

    output = model.generate(input_tokens["input_ids"], max_new_tokens=20, use_cache=True, return_dict_in_generate=True)

    assert isinstance(output, GenerateOutput)
    assert isinstance(model.tokenizer.decode(output.sequences[0]), str)
    assert output.sequences.shape[1] > input_tokens["input_ids"].shape[1]


def test_a_padded_batch_equals_transformers(model: AutoModel, tiny_llama_dir: Path) -> None:
    full = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    ids = torch.tensor([[0, 0, 0, 30, 31], [40, 41, 42, 43, 44]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    expected = full.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)

    output = model.generate(ids, attention_mask=mask, max_new_tokens=12)

    assert isinstance(output, torch.Tensor)
    assert output.tolist() == expected.tolist()


def test_the_same_seed_generates_the_same_tokens(model: AutoModel) -> None:
    ids = torch.tensor([[30, 31, 32]])

    first, second, third = (
        model.generate(ids, max_new_tokens=16, do_sample=True, temperature=1.5, seed=seed) for seed in (1, 1, 2)
    )

    assert isinstance(first, torch.Tensor)
    assert isinstance(third, torch.Tensor)
    assert first.tolist() == second.tolist()  # type: ignore[union-attr]
    assert first.tolist() != third.tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prefetching": False}, "prefetching=False is not supported"),
        ({"compression": "3bit"}, "'3bit' is no format"),
        ({"compression": "4bit", "delete_original": True}, "does not go with compression"),
    ],
)
def test_what_is_not_supported_is_refused(
    arguments: dict[str, object], words: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=words):
        AutoModel.from_pretrained(tiny_llama_dir, layer_shards_saving_path=tmp_path, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("compression", "variant"), [("4bit", "~nf4"), ("8bit", "~int8"), ("fp4", "~fp4")])
def test_compression_streams_a_packed_form(
    compression: str, variant: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with AutoModel.from_pretrained(
        tiny_llama_dir, compression, layer_shards_saving_path=tmp_path, device="cpu", ram=0
    ) as model:
        output = model.generate(torch.tensor([[30, 31, 32]]), max_new_tokens=3)

    assert model.engine.facts.model.endswith(variant)
    assert isinstance(output, torch.Tensor)
    assert output.shape == (1, 6)


def test_profiling_tells_after_each_call_where_its_time_went(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.tensor([[30, 31, 32], [40, 41, 42]])

    with AutoModel.from_pretrained(
        tiny_llama_dir, layer_shards_saving_path=tmp_path, device="cpu", profiling_mode=True
    ) as model:
        plain = AutoModel(model.engine).generate(ids, max_new_tokens=3)
        silence = capsys.readouterr().out
        first = model.generate(ids, max_new_tokens=3)
        told = capsys.readouterr().out
        model.generate(ids[:1], max_new_tokens=1)
        told_again = capsys.readouterr().out

    assert silence == ""
    assert isinstance(plain, torch.Tensor)
    assert isinstance(first, torch.Tensor)
    assert first.tolist() == plain.tolist()
    assert "generate: 6 tokens in " in told
    assert "tokens/s" in told
    for column in ("from disk", "from RAM", "from VRAM", "read s", "copy s", "compute s", "bubble s"):
        assert column in told
    sequences, sweeps, from_disk, from_ram = _cells(told)[:4]
    assert (sequences, sweeps, from_disk) == ("2", "3", "-")
    assert from_ram.endswith("KiB")
    assert "generate: 1 tokens in " in told_again
    assert _cells(told_again)[:2] == ["1", "1"]


def _cells(table: str) -> list[str]:
    """The cells of the only row."""
    (row,) = (line for line in table.splitlines() if line.startswith("│"))
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_unknown_arguments_are_errors(model: AutoModel, tiny_llama_dir: Path) -> None:
    with pytest.raises(TypeError):
        AutoModel.from_pretrained(tiny_llama_dir, max_memory="4GiB")  # type: ignore[call-arg]

    with pytest.raises(OptionError, match="num_beams"):
        model.generate(torch.tensor([[1]]), num_beams=4)

    with pytest.raises(OptionError, match="max_new_tokens"):
        model.generate(torch.tensor([[1]]), max_new_tokens=0)


def test_a_prompt_that_is_too_long_is_refused_and_the_next_one_runs(model: AutoModel) -> None:
    with pytest.raises(SequenceError, match="Shorten the prompt"):
        model.generate(torch.full((1, 100_000), 5))

    assert model.generate(torch.tensor([[30, 31]]), max_new_tokens=2).shape == (1, 4)  # type: ignore[union-attr]


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        AutoModel.from_pretrained(tmp_path / "nowhere", layer_shards_saving_path=tmp_path)


def test_budgets_are_those_of_the_engine(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with AutoModel.from_pretrained(tiny_llama_dir, layer_shards_saving_path=tmp_path, device="cpu", ram=0) as model:
        assert {place.tier for place in model.engine.plan.layers} == {Tier.DISK}

    with pytest.raises(OptionError, match="ram is 'much'"):
        AutoModel.from_pretrained(tiny_llama_dir, layer_shards_saving_path=tmp_path, device="cpu", ram="much")
