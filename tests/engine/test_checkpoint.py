"""Finding the files of a checkpoint directory, and refusing what is not one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella_engine import ShardStore
from lamella_engine.checkpoint import DirectoryCheckpoint, read_bytes
from lamella_engine.errors import CheckpointError, ModelError, ModelNotFound, UnsupportedModel
from tests import tiny_models
from tests.engine.shards import stored_weights

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_llama(tmp_path_factory.mktemp("many") / "tiny", max_shard_size="200KB")


@pytest.fixture
def copied(many_files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(many_files, tmp_path / "copied"))


def test_many_files_hold_the_same_model_as_one(many_files: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert len(list(many_files.glob("*.safetensors"))) > 2

    split = stored_weights(ShardStore(tmp_path / "a").ensure("tiny", source=many_files))
    single = stored_weights(ShardStore(tmp_path / "b").ensure("tiny", source=tiny_llama_dir))

    assert split.keys() == single.keys()
    assert all(torch.equal(split[name], single[name]) for name in single)


def test_files_are_found_through_the_index_whatever_their_names(copied: Path, tmp_path: Path) -> None:
    index = json.loads((copied / INDEX).read_text())
    renamed = {
        old: f"part_{number}.bin.weights" for number, old in enumerate(sorted(set(index["weight_map"].values())))
    }
    for old, new in renamed.items():
        (copied / old).rename(copied / new)
    index["weight_map"] = {name: renamed[file] for name, file in index["weight_map"].items()}
    (copied / INDEX).write_text(json.dumps(index))

    assert len(ShardStore(tmp_path / "store").ensure("tiny", source=copied).layers) == 4


@pytest.mark.parametrize("pattern", ["model-{:05d}-of-00003", "model_{}", "pytorch_model-{:02d}", "9-{}.weights", "{}"])
def test_file_names_say_nothing_about_order_or_content(pattern: str, copied: Path, tmp_path: Path) -> None:
    index = json.loads((copied / INDEX).read_text())
    before = dict(DirectoryCheckpoint.open(copied).tensors.items())
    old_names = sorted(set(index["weight_map"].values()), reverse=True)
    new_names = {old: f"{pattern.format(number)}.safetensors" for number, old in enumerate(old_names)}
    for old in old_names:
        (copied / old).rename(copied / f"{new_names[old]}.moved")
    for moved in copied.glob("*.moved"):
        moved.rename(moved.with_suffix(""))
    entries = list(index["weight_map"].items())
    random.Random(7).shuffle(entries)
    (copied / INDEX).write_text(json.dumps({"weight_map": {name: new_names[file] for name, file in entries}}))

    opened = DirectoryCheckpoint.open(copied)

    assert {name: entry.shape for name, entry in opened.tensors.items()} == {n: e.shape for n, e in before.items()}
    assert len(ShardStore(tmp_path / "store").ensure("tiny", source=copied).layers) == 4


def test_a_sole_file_needs_neither_the_usual_name_nor_an_index(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama_dir, tmp_path / "source"))
    (source / "model.safetensors").rename(source / "Tiny-Llama.fp32.safetensors")
    (source / "adapter_model.safetensors").write_bytes(b"no part of the model")
    (source / "consolidated.safetensors").write_bytes(b"the same in another layout")

    assert len(ShardStore(tmp_path / "store").ensure("tiny", source=source).layers) == 4


def test_a_sole_index_needs_no_usual_name(copied: Path, tmp_path: Path) -> None:
    (copied / INDEX).rename(copied / "model.fp32.safetensors.index.json")

    assert len(ShardStore(tmp_path / "store").ensure("tiny", source=copied).layers) == 4


def test_files_without_an_index_are_one_model_if_no_tensor_is_in_two(copied: Path, tmp_path: Path) -> None:
    expected = {name: entry.shape for name, entry in DirectoryCheckpoint.open(copied).tensors.items()}
    (copied / INDEX).unlink()

    opened = DirectoryCheckpoint.open(copied)

    assert {name: entry.shape for name, entry in opened.tensors.items()} == expected
    assert len(ShardStore(tmp_path / "store").ensure("tiny", source=copied).layers) == 4


def test_a_missing_part_without_an_index_is_noticed_before_a_shard_is_written(copied: Path, tmp_path: Path) -> None:
    (copied / INDEX).unlink()
    sorted(copied.glob("*.safetensors"))[1].unlink()

    with pytest.raises(ModelError, match="layers"):
        ShardStore(tmp_path / "store").ensure("tiny", source=copied)

    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_two_copies_without_an_index_are_refused(copied: Path) -> None:
    (copied / INDEX).unlink()
    first = sorted(copied.glob("*.safetensors"))[0]
    shutil.copy(first, copied / "model.fp16.safetensors")

    with pytest.raises(CheckpointError, match=rf"both {first.name} and model\.fp16\.safetensors hold 'model\."):
        DirectoryCheckpoint.open(copied)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "gptq_model-4bit-128g.safetensors"])
def test_a_sole_file_is_the_model_whatever_its_name(name: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama_dir, tmp_path / "source"))
    (source / "model.safetensors").rename(source / name)

    assert len(ShardStore(tmp_path / "store").ensure("tiny", source=source).layers) == 4


def test_several_indexes_are_refused(copied: Path) -> None:
    shutil.copy(copied / INDEX, copied / "a.safetensors.index.json")
    (copied / INDEX).rename(copied / "b.safetensors.index.json")

    with pytest.raises(CheckpointError, match="2 indexes"):
        DirectoryCheckpoint.open(copied)


def test_of_two_copies_the_one_counts_that_the_index_names(copied: Path, tmp_path: Path) -> None:
    name, weight_map = "model.norm.weight", json.loads((copied / INDEX).read_text())["weight_map"]
    other = next(file for file in sorted(set(weight_map.values())) if file != weight_map[name])
    value = load_file(copied / weight_map[name])[name]
    save_file(load_file(copied / other) | {name: value + 1}, copied / other, metadata={"format": "pt"})

    assert torch.equal(DirectoryCheckpoint.open(copied).read(name), value)

    del weight_map[name]
    (copied / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is both in .* does not say which counts"):
        DirectoryCheckpoint.open(copied)


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (["config.json", "consolidated.safetensors"], "Mistral's own consolidated format"),
        (["config.json", "consolidated-00001-of-00002.safetensors"], "Mistral's own consolidated format"),
        (["params.json", "consolidated.safetensors"], "params.json: it is Mistral's own format"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter, not a model"),
        (["config.json", "adapter_model.safetensors"], "holds an adapter only"),
        (["config.json", "consolidated.00.pth"], "a pickle, which could run code"),
    ],
)
def test_other_layouts_are_refused_with_advice(files: list[str], advice: str, tmp_path: Path) -> None:
    for file in files:
        if file.endswith(".safetensors"):
            save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, tmp_path / file)
        else:
            (tmp_path / file).write_text("{}")

    with pytest.raises(CheckpointError, match=advice):
        DirectoryCheckpoint.open(tmp_path)


def test_a_file_that_the_index_names_must_be_there(copied: Path) -> None:
    missing = sorted(copied.glob("*.safetensors"))[1]
    missing.unlink()

    with pytest.raises(CheckpointError, match=f"{missing.name} is missing"):
        DirectoryCheckpoint.open(copied)


def test_a_tensor_that_the_index_names_must_be_in_its_file(copied: Path) -> None:
    index = json.loads((copied / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"]["model.norm.weight"]
    (copied / INDEX).write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match=r"'model\.extra\.weight'.*do not belong together"):
        DirectoryCheckpoint.open(copied)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/file.safetensors", "..", "."])
def test_an_index_cannot_name_files_elsewhere(file: str, copied: Path) -> None:
    (copied / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))

    with pytest.raises(CheckpointError, match="not a plain file name"):
        DirectoryCheckpoint.open(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_broken_index_is_refused(text: str, copied: Path) -> None:
    (copied / INDEX).write_text(text)

    with pytest.raises(CheckpointError, match=INDEX):
        DirectoryCheckpoint.open(copied)


def test_pickled_weights_are_refused_with_the_way_out(tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")

    with pytest.raises(CheckpointError, match=r"pickle, which could run code.*save_pretrained"):
        DirectoryCheckpoint.open(tmp_path)


def test_a_directory_of_ggufs_says_to_name_the_file(tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    with pytest.raises(CheckpointError, match=r"name the file itself, such as .*model\.gguf"):
        DirectoryCheckpoint.open(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no checkpoint directory"):
        DirectoryCheckpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        DirectoryCheckpoint.open(tmp_path)


@pytest.mark.parametrize("config", ["", "{", "[]", '"llama"', "{}", '{"model_type": "no_such_family"}'])
def test_a_broken_config_is_refused(config: str, copied: Path, tmp_path: Path) -> None:
    (copied / "config.json").write_text(config)

    with pytest.raises((CheckpointError, UnsupportedModel)):
        ShardStore(tmp_path / "store").ensure("tiny", source=copied)


@pytest.mark.parametrize(
    "values", [{"hidden_size": 63}, {"num_attention_heads": 0}, {"vocab_size": -1}, {"vocab_size": "many"},
               {"hidden_size": 2**62}, {"hidden_act": "nothing"}, {"intermediate_size": None}],
)  # fmt: skip
def test_absurd_config_values_are_errors_of_the_checkpoint(
    values: dict[str, object], copied: Path, tmp_path: Path
) -> None:
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))

    with pytest.raises((CheckpointError, UnsupportedModel)):
        ShardStore(tmp_path / "store").ensure("tiny", source=copied)


def test_code_of_the_repository_is_not_run(copied: Path, tmp_path: Path) -> None:
    path = copied / "config.json"
    remote = {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | remote))
    (copied / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    with pytest.raises(UnsupportedModel):
        ShardStore(tmp_path / "store").ensure("tiny", source=copied)

    assert not (tmp_path / "ran").exists()


def test_a_read_past_the_end_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"12345")

    with pytest.raises(CheckpointError, match=r"short ends 3 bytes early"):
        read_bytes(tmp_path / "short", 2, 6)


def test_the_fingerprint_tells_any_file_that_changed(copied: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    before = DirectoryCheckpoint.open(copied).fingerprint
    assert DirectoryCheckpoint.open(copied).fingerprint == before

    weights = next(copied.glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    after_weights = DirectoryCheckpoint.open(copied).fingerprint
    (copied / "generation_config.json").write_text("{}")

    assert len({before, after_weights, DirectoryCheckpoint.open(copied).fingerprint}) == 3
