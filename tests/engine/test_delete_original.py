"""Deleting what shards were built from: only what was named, only if nothing is lost, never before all is proved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lamella_engine import AutoModel, ShardStore
from lamella_engine.cli import app
from lamella_engine.errors import CheckpointError, ModelError, ShardError
from tests import tiny_gguf
from tests.engine import packing_formats
from tests.engine.fake_hub import serve_hub
from tests.engine.shards import stored_weights


@pytest.fixture
def source(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "source"))


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "store")


def test_the_weights_go_and_the_model_stays(source: Path, store: ShardStore) -> None:
    (source / "notes.txt").write_text("not the model's")
    before = stored_weights(store.ensure("tiny", source=source))
    size = (source / "model.safetensors").stat().st_size

    deleted = store.delete_original("tiny", source)

    assert (deleted.files, deleted.nbytes, deleted.kept) == ((source / "model.safetensors",), size, ())
    assert {"config.json", "tokenizer.json", "notes.txt"} <= {file.name for file in source.iterdir()}
    assert not list(source.glob("*.safetensors"))
    after = stored_weights(store.open("tiny"))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_was_deleted_still_names_its_model(source: Path, store: ShardStore) -> None:
    model = store.ensure(source)

    store.delete_original(model.name, source)

    assert store.ensure(source).name == model.name
    assert store.ensure(model.name, source=source).name == model.name
    assert store.delete_original(model.name, source).files == ()
    with pytest.raises(CheckpointError, match="neither"):
        store.ensure("another", source=source)


def test_only_what_was_named_is_deleted(source: Path, store: ShardStore, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(source, tmp_path / "twin"))
    store.ensure("tiny", source=source)

    assert store.delete_original("tiny").files == ()
    assert store.delete_original("tiny", twin).files == ()
    assert store.delete_original("tiny", tmp_path).files == ()

    assert (source / "model.safetensors").is_file()
    assert (twin / "model.safetensors").is_file()


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_nothing_is_deleted_if_a_shard_is_not_whole(harm: str, source: Path, store: ShardStore) -> None:
    shard = store.ensure("tiny", source=source).layers[2].path
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    stat = shard.stat()
    if harm == "remove":
        shard.unlink()
    else:
        shard.write_bytes(raw if harm == "flip" else raw[:-1])
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    with pytest.raises(ShardError):
        store.delete_original("tiny", source)

    assert (source / "model.safetensors").is_file()


def test_an_original_that_changed_since_stays(source: Path, store: ShardStore) -> None:
    store.ensure("tiny", source=source)
    (source / "generation_config.json").write_text("{}")

    with pytest.raises(ModelError, match="was written again since"):
        store.delete_original("tiny", source)

    assert (source / "model.safetensors").is_file()


def test_tensors_that_no_shard_holds_keep_the_original(source: Path, store: ShardStore) -> None:
    tensors = load_file(source / "model.safetensors") | {"vision_tower.patch.weight": torch.ones(3)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    store.ensure("tiny", source=source)

    with pytest.raises(ModelError, match=r"1 tensors that the shards of tiny do not.*vision_tower"):
        store.delete_original("tiny", source)

    assert (source / "model.safetensors").is_file()


def test_digits_that_no_shard_holds_keep_the_original(source: Path, store: ShardStore) -> None:
    store.ensure("tiny", source=source, dtype="bfloat16")

    with pytest.raises(ModelError, match="as bfloat16 only"):
        store.delete_original("tiny", source)

    assert (source / "model.safetensors").is_file()


def test_links_to_files_elsewhere_stay(source: Path, store: ShardStore, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    (source / "model.safetensors").rename(elsewhere)
    (source / "model.safetensors").symlink_to(elsewhere)
    store.ensure("tiny", source=source)

    deleted = store.delete_original("tiny", source)

    assert deleted.files == ()
    assert deleted.kept == (source / "model.safetensors",)
    assert elsewhere.is_file()


def test_packed_and_gguf_originals_can_go(tiny_llama_dir: Path, store: ShardStore, tmp_path: Path) -> None:
    settings: packing_formats.Settings = {"quant_method": "fbgemm_fp8"}
    packed = packing_formats.repack(
        tiny_llama_dir, tmp_path / "packed", settings, lambda w: packing_formats.fp8_rows(w, "weight_scale")
    )
    file = tiny_gguf.save_llama_gguf(tmp_path / "tiny.gguf")
    store.ensure("packed", source=packed)
    store.ensure("gguf", source=file)

    store.delete_original("packed", packed)
    store.delete_original("gguf", file)

    assert not (packed / "model.safetensors").exists()
    assert not file.exists()
    assert store.ensure("gguf", source=file).name == "gguf"


def test_a_pulled_model_is_deleted_from_the_download_cache(
    source: Path, store: ShardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    with serve_hub(tmp_path, monkeypatch) as hub:
        hub.add("owner/tiny", files)
        done = CliRunner().invoke(app, ["pull", "owner/tiny", "--store", str(store.root), "--delete-original"])
        cache = Path(os.environ["HF_HUB_CACHE"]) / "models--owner--tiny"

    assert done.exit_code == 0, done.output
    assert "deleted the original: 1 files" in done.output
    snapshot = next((cache / "snapshots").iterdir())
    assert (snapshot / "config.json").is_file()
    assert not (snapshot / "model.safetensors").exists()
    sizes = [blob.stat().st_size for blob in (cache / "blobs").iterdir()]
    assert len(files["model.safetensors"]) not in sizes
    assert len(store.open("owner/tiny").layers) == 4


def test_a_blob_that_another_commit_uses_stays(source: Path, store: ShardStore, tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--tiny"
    blob = cache / "blobs" / "abc"
    for commit in ("1" * 40, "2" * 40):
        snapshot = cache / "snapshots" / commit
        shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
        (snapshot / "model.safetensors").symlink_to(Path("../../blobs/abc"))
    blob.parent.mkdir()
    shutil.copyfile(source / "model.safetensors", blob)
    first, second = sorted((cache / "snapshots").iterdir())
    store.ensure("first", source=first)
    store.ensure("second", source=second)

    one = store.delete_original("first", first)

    assert one.nbytes == 0
    assert blob.is_file()
    assert (second / "model.safetensors").is_file()

    two = store.delete_original("second", second)

    assert two.nbytes > 0
    assert not blob.exists()


def test_the_command_deletes_after_it_has_built(source: Path, store: ShardStore) -> None:
    call = ["import", "tiny", str(source), "--store", str(store.root), "--delete-original"]

    first, again = CliRunner().invoke(app, call), CliRunner().invoke(app, call)

    assert first.exit_code == 0, first.output
    assert "deleted the original: 1 files" in first.output
    assert again.exit_code == 0, again.output
    assert "no original was deleted" in again.output


def test_auto_model_deletes_the_original_and_opens_again(source: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with AutoModel.from_pretrained(
            source, layer_shards_saving_path=tmp_path / "store", delete_original=True, device="cpu"
        ) as model:
            assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape == (1, 5)

        assert not (source / "model.safetensors").exists()


def test_a_model_with_an_index_loses_every_file_that_it_names(source: Path, store: ShardStore) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    halves = {"b-00.safetensors": list(tensors)[::2], "a-01.safetensors": list(tensors)[1::2]}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, source / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in halves.items() for name in names}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    store.ensure("tiny", source=source)

    deleted = store.delete_original("tiny", source)

    assert {file.name for file in deleted.files} == set(halves)
    assert not list(source.glob("*.safetensors"))
