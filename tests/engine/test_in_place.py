"""Layers read from the original's files: the same model, without a second copy, and never a silently different one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lamella_engine import Engine, EngineOptions, Sampling, ShardStore
from lamella_engine.cli import app
from lamella_engine.errors import ModelError, ShardError
from lamella_engine.shard import ShardedModel
from lamella_engine.stored_form import StoredForm
from tests.engine.engine_driver import full_load_tokens, gather, submit_ids
from tests.engine.fake_hub import serve_hub
from tests.engine.shards import stored_weights

PROMPTS = [[5, 9, 13], list(range(40, 70)), [7]]
IN_PLACE = StoredForm(in_place=True)
GREEDY = Sampling(max_tokens=8, ignore_eos=True)


@pytest.fixture
def source(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "source"))


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "store")


def placed(model: ShardedModel) -> list[bool]:
    """Of each layer, whether it is read in place."""
    return [shard.path.name.startswith("original-") for shard in model.layers]


def tokens(model: ShardedModel, ram: int | str) -> list[list[int]]:
    options = EngineOptions(store=model.directory, device="cpu", sweep_tokens=64, ram=ram)
    with Engine.open_sharded(model, torch.device("cpu"), options) as engine:
        for name, prompt in enumerate(PROMPTS):
            submit_ids(engine, str(name), prompt, GREEDY)
        outcomes = gather(engine, {str(name) for name in range(len(PROMPTS))})
    return [outcomes[str(name)].token_ids for name in range(len(PROMPTS))]


def expected(source: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    return [full_load_tokens(model, prompt, GREEDY.max_tokens) for prompt in PROMPTS]


@pytest.mark.parametrize("ram", [0, "auto"])
def test_the_model_is_the_same_and_takes_the_room_of_its_root_alone(
    ram: int | str, source: Path, store: ShardStore, tmp_path: Path
) -> None:
    whole = ShardStore(tmp_path / "other").ensure("tiny", source=source)

    model = store.ensure("tiny", source=source, form=IN_PLACE)

    assert all(placed(model))
    own, usual = stored_weights(model), stored_weights(whole)
    assert own.keys() == usual.keys()
    assert all(torch.equal(own[name], usual[name]) for name in usual)
    assert tokens(model, ram) == expected(source)
    files = [path for path in model.directory.iterdir() if path.stat().st_nlink == 1]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < model.root.nbytes + 8192
    assert store.verify("tiny").is_in_place


def test_deleting_the_original_loses_nothing(source: Path, store: ShardStore) -> None:
    before = expected(source)
    store.ensure("tiny", source=source, form=IN_PLACE)

    shutil.rmtree(source)

    assert tokens(store.open("tiny"), 0) == before


def test_without_hard_links_the_original_has_to_stay_and_its_loss_is_told(
    source: Path, store: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    model = store.ensure("tiny", source=source, form=IN_PLACE)
    assert all(placed(model))
    assert tokens(model, 0) == expected(source)

    (source / "model.safetensors").unlink()

    with pytest.raises(ShardError, match=r"original-00000.safetensors: it cannot be found"):
        store.open("tiny")


def test_an_original_that_was_changed_is_refused(source: Path, store: ShardStore) -> None:
    store.ensure("tiny", source=source, form=IN_PLACE)

    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1\2\3\4\5\6\7\0")

    with pytest.raises(ShardError, match=r"original-00000.safetensors: its contents are not those that were built"):
        store.open("tiny")


def test_only_layers_that_lie_together_in_one_file_are_left_there(
    source: Path, store: ShardStore, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layer = sum(weight.numel() * 4 for weight in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "parts", max_shard_size=int(1.4 * layer))
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2

    sharded = store.ensure("tiny", source=tmp_path / "parts", form=IN_PLACE)

    assert set(placed(sharded)) == {True, False}
    assert tokens(sharded, 0) == expected(source)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2"])
def test_what_has_to_be_converted_is_written(
    family: str, tiny_checkpoint: Callable[[str], Path], store: ShardStore
) -> None:
    checkpoint = tiny_checkpoint(family)

    model = store.ensure("tiny", source=checkpoint, form=IN_PLACE)

    assert any(placed(model)) == (family == "gpt2")
    assert tokens(model, 0) == expected(checkpoint)


def test_another_dtype_is_written(source: Path, store: ShardStore) -> None:
    assert not any(placed(store.ensure("tiny", source=source, dtype="bfloat16", form=IN_PLACE)))


def test_a_model_with_shards_of_its_own_is_not_taken_for_one_in_place(source: Path, store: ShardStore) -> None:
    store.ensure("tiny", source=source)

    with pytest.raises(ModelError, match=r"shards of its own.*lamella models remove tiny"):
        store.ensure("tiny", source=source, form=IN_PLACE)


def test_asking_again_builds_nothing_and_either_way_opens_it(source: Path, store: ShardStore) -> None:
    first = store.ensure("tiny", source=source, form=IN_PLACE)

    assert store.ensure("tiny", source=source, form=IN_PLACE) == first
    assert store.ensure("tiny", source=source) == first
    assert store.ensure("tiny") == first


def test_removing_the_model_leaves_the_original_and_tells_what_is_freed(source: Path, store: ShardStore) -> None:
    size = (source / "model.safetensors").stat().st_size
    store.ensure("tiny", source=source, form=IN_PLACE)

    freed = store.remove("tiny")

    assert freed < size
    assert (source / "model.safetensors").stat().st_size == size
    assert (source / "model.safetensors").stat().st_nlink == 1


def test_there_is_no_original_to_delete(source: Path, store: ShardStore) -> None:
    store.ensure("tiny", source=source, form=IN_PLACE)

    with pytest.raises(ModelError, match=r"reads 1 files of its original in place.*nothing was"):
        store.delete_original("tiny", source)

    assert (source / "model.safetensors").is_file()


def test_a_manifest_from_before_layers_were_read_in_place_opens(source: Path, store: ShardStore) -> None:
    store.ensure("tiny", source=source)
    path = store.root / "tiny" / "manifest.json"
    values = json.loads(path.read_text())
    for key in ("originals", "is_in_place"):
        del values[key]
    path.write_text(json.dumps(values))

    assert store.open("tiny").layers


@pytest.mark.parametrize(
    "change",
    [{"start": -1}, {"nbytes": 1 << 40}, {"file": "../../etc/passwd"}, {"file": "root.safetensors"}, {"tensors": 3}],
)
def test_a_place_that_makes_no_sense_is_refused(change: dict[str, object], source: Path, store: ShardStore) -> None:
    model = store.ensure("tiny", source=source, form=IN_PLACE)
    place = model.directory / "layer-00001.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))

    with pytest.raises(ShardError, match=r"layer-00001\.json"):
        store.open("tiny")


def test_the_command_says_how_many_layers_stay_where_they_are(source: Path, tmp_path: Path) -> None:
    call = ["import", "tiny", str(source), "--store", str(tmp_path / "store"), "--in-place"]

    done = CliRunner().invoke(app, call)

    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    assert done.exit_code == 0, done.output
    assert f"{layers} of the layers read from the original's files" in done.output
    for other in ("--delete-original", "--allow-pickle"):
        refused = CliRunner().invoke(app, [*call, other])
        assert refused.exit_code == 2
        assert "--in-place" in refused.output


def test_a_download_is_read_from_the_hubs_cache(
    source: Path, store: ShardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub(tmp_path, monkeypatch) as hub:
        hub.add("owner/tiny", {file.name: file.read_bytes() for file in source.iterdir()})
        done = CliRunner().invoke(app, ["pull", "owner/tiny", "--store", str(store.root), "--in-place"])

    assert done.exit_code == 0, done.output
    model = store.open("owner/tiny")
    assert all(placed(model))
    shutil.rmtree(os.environ["HF_HUB_CACHE"])
    assert tokens(model, 0) == expected(source)
