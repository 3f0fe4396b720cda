"""The store: what it serves is what was asked for, checked and complete, or an error that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from lamella_engine import ShardStore
from lamella_engine.errors import (
    CheckpointError,
    ModelError,
    ModelNameError,
    ModelNotFound,
    OptionError,
    ShardError,
)
from lamella_engine.shard import ShardedModel
from lamella_engine.shard_check import CLOCK_TICK_NS
from lamella_engine.shard_store import default_store_root
from tests import tiny_models
from tests.engine.shards import Steps, stored_weights
from tests.waiting import wait_until


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "store")


@pytest.fixture
def source(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint directory that the test may change."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "source"))


def _settle(model: ShardedModel) -> None:
    """Wait until the files are old enough for stamps."""
    newest = max(path.stat().st_ctime_ns for path in model.directory.iterdir())
    wait_until(lambda: time.time_ns() - newest > CLOCK_TICK_NS)


def test_a_built_model_needs_neither_source_nor_network(
    store: ShardStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.ensure("tiny", source=source)
    expected = AutoTokenizer.from_pretrained(source)
    chat = [{"role": "user", "content": "Hello, river!"}]
    rendered = expected.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    shutil.rmtree(source)

    def refuse(*args: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = store.ensure("tiny", source=source, offline=True)

    tokenizer = AutoTokenizer.from_pretrained(model.directory, local_files_only=True)
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == rendered
    assert GenerationConfig.from_pretrained(model.directory, local_files_only=True).eos_token_id == 2
    assert len(stored_weights(model)) == 39


def test_the_manifest_says_what_was_built_from_what(store: ShardStore, source: Path) -> None:
    model = store.ensure("tiny", source=source)

    manifest = store.manifest("tiny")

    assert (manifest.name, manifest.family, manifest.source_kind, manifest.dtype) == (
        "tiny", "llama", "directory", "float32",
    )  # fmt: skip
    assert manifest.source == str(source)
    assert manifest.revision is None
    assert [record.file for record in manifest.layers] == [f"layer-0000{index}.safetensors" for index in range(4)]
    assert {record.file for record in manifest.companions} >= {
        "config.json",
        "tokenizer.json",
        "generation_config.json",
    }
    assert model.size_bytes == sum(shard.nbytes for shard in (model.root, *model.layers))
    assert store.list() == (manifest,)


def test_a_second_ensure_builds_nothing(store: ShardStore, source: Path) -> None:
    first = store.ensure("tiny", source=source)
    steps = Steps()

    second = store.ensure("tiny", source=source, progress=steps)

    assert second == first
    assert "build" not in steps.phases


def test_progress_counts_every_byte_of_the_build(store: ShardStore, source: Path) -> None:
    steps = Steps()

    store.ensure("tiny", source=source, progress=steps)

    done = [call[1] for call in steps.calls if call[0] == "build"]
    total = {call[2] for call in steps.calls if call[0] == "build"}
    assert done == sorted(done)
    assert done[0] == 0
    assert total == {done[-1]}


def test_a_path_is_a_model_of_its_own(store: ShardStore, source: Path, tmp_path: Path) -> None:
    other = tiny_models.save_tiny_llama(tmp_path / "elsewhere" / "source", seed=1)

    first, second = store.ensure(source), store.ensure(str(other))

    assert first.name != second.name
    assert store.ensure(source) == first
    assert store.open(second.name) == second


def test_a_path_that_is_gone_is_served_from_the_store(store: ShardStore, source: Path) -> None:
    built = store.ensure(source)
    shutil.rmtree(source)

    assert store.ensure(source) == built
    assert store.ensure(built.name) == built


def test_another_model_at_the_same_path_is_never_served_the_first_ones_weights(store: ShardStore, source: Path) -> None:
    first = stored_weights(store.ensure(source))
    stamp = (source / "model.safetensors").stat()
    tiny_models.save_tiny_llama(source, seed=1)
    os.utime(source / "config.json", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    second = stored_weights(store.ensure(source))

    name = "model.layers.0.mlp.up_proj.weight"
    assert first[name].shape == second[name].shape
    assert not torch.equal(first[name], second[name])


def test_a_name_is_not_silently_given_to_another_checkpoint(store: ShardStore, source: Path, tmp_path: Path) -> None:
    store.ensure("tiny", source=source)
    other = tiny_models.save_tiny_llama(tmp_path / "other", seed=1)

    with pytest.raises(ModelError, match=r"in the store already.*lamella models remove tiny"):
        store.ensure("tiny", source=other)

    assert store.manifest("tiny").source == str(source)


def test_a_changed_source_is_built_again_and_the_old_shards_go(store: ShardStore, source: Path) -> None:
    first = store.ensure("tiny", source=source)
    tiny_models.save_tiny_llama(source, seed=1)

    second = store.ensure("tiny", source=source)

    assert second.directory != first.directory
    assert not first.directory.exists()
    assert len(store.list()) == 1


def test_shards_that_are_open_outlive_their_removal(store: ShardStore, source: Path) -> None:
    model = store.ensure("tiny", source=source)
    with model.layers[1].path.open("rb") as file:
        whole = model.layers[1].path.read_bytes()

        freed = store.remove("tiny") if store.has("tiny") else 0

        assert file.read() == whole
    assert freed > model.size_bytes
    assert not store.has("tiny")
    assert not model.directory.exists()


@pytest.mark.parametrize("file", ["layer-00002.safetensors", "root.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "remove"])
def test_a_damaged_file_is_an_error_that_names_it_and_the_fix(
    file: str, damage: str, store: ShardStore, source: Path
) -> None:
    model = store.ensure("tiny", source=source)
    _settle(model)
    store.open("tiny")
    path = model.directory / file
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif damage == "truncate":
        path.write_bytes(raw[:-1])
    elif damage == "grow":
        path.write_bytes(raw + b"\0")
    else:
        path.unlink()

    shutil.move(source, source.with_name("elsewhere"))
    for attempt in (store.open, store.verify, store.ensure):
        with pytest.raises(ShardError, match=rf"{file}.*lamella models remove tiny"):
            attempt("tiny")


@pytest.mark.parametrize("file", ["layer-00002.safetensors", "root.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_file_is_set_aside_and_built_again_where_its_source_is_there(
    file: str, damage: str, store: ShardStore, source: Path
) -> None:
    model = store.ensure("tiny", source=source)
    before = {path.name: path.read_bytes() for path in model.directory.glob("*.*s*")}
    untouched = model.layers[0].path.stat().st_ino
    path = model.directory / file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink()
    if damage == "flip":
        path.write_bytes(raw)

    store.ensure("tiny")

    store.verify("tiny")
    assert path.read_bytes() == before[file]
    assert model.layers[0].path.stat().st_ino == untouched, "only what was damaged is built"
    aside = [(found.name, found.read_bytes()) for found in store.root.glob(".damaged/tiny/*")]
    assert aside == ([(file, bytes(raw))] if damage == "flip" else [])


def test_a_damaged_model_is_not_mended_from_a_source_that_changed(store: ShardStore, source: Path) -> None:
    model = store.ensure("tiny", source=source)
    model.layers[2].path.unlink()
    os.utime(source / "model.safetensors", (1, 1))

    with pytest.raises(ShardError, match=r"layer-00002\.safetensors"):
        store.ensure("tiny")


def test_all_damaged_files_are_counted(store: ShardStore, source: Path) -> None:
    model = store.ensure("tiny", source=source)
    for layer in model.layers[1:]:
        layer.path.unlink()

    with pytest.raises(ShardError, match=r"layer-00001\.safetensors.*and 2 more"):
        store.open("tiny")


def test_files_are_hashed_once_and_again_after_any_touch(store: ShardStore, source: Path) -> None:
    model = store.ensure("tiny", source=source)
    _settle(model)
    store.open("tiny")

    untouched, touched, verified = Steps(), Steps(), Steps()
    store.open("tiny", progress=untouched)
    os.utime(model.layers[0].path)
    store.open("tiny", progress=touched)
    store.verify("tiny", progress=verified)

    assert untouched.calls == []
    assert touched.calls[-1] == ("check", model.layers[0].path.stat().st_size, model.layers[0].path.stat().st_size)
    assert verified.calls[-1][1] > model.size_bytes


def test_a_change_that_keeps_size_and_mtime_is_found(store: ShardStore, source: Path) -> None:
    model = store.ensure("tiny", source=source)
    _settle(model)
    store.open("tiny")
    path = model.layers[3].path
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(ShardError, match=r"layer-00003\.safetensors"):
        store.open("tiny")


def test_a_change_right_after_the_check_is_found(store: ShardStore, source: Path) -> None:
    model = store.ensure("tiny", source=source)
    with model.layers[0].path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")

    with pytest.raises(ShardError, match=r"layer-00000\.safetensors"):
        store.open("tiny")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": 99, "name": "tiny"}', "[" * 100_000],
)
def test_a_damaged_manifest_is_an_error_with_the_fix(text: str, store: ShardStore, source: Path) -> None:
    store.ensure("tiny", source=source)
    (store.root / "tiny" / "manifest.json").write_text(text)

    with pytest.raises(ShardError, match=r"manifest\.json.*lamella models remove tiny"):
        store.open("tiny")

    assert store.list() == ()
    assert len(store.damaged()) == 1
    store.remove("tiny")
    assert store.damaged() == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [("build", "../../outside"), ("build", "/etc"), ("layers", []), ("built_at", "now"), ("name", 3), ("root", None),
     ("root", {"file": "../x", "nbytes": 1, "sha256": "0" * 64}),
     ("root", {"file": "x", "nbytes": -1, "sha256": "0" * 64}),
     ("root", {"file": "x", "nbytes": 1, "sha256": "zz"})],
)  # fmt: skip
def test_a_manifest_with_wrong_entries_is_refused(key: str, value: object, store: ShardStore, source: Path) -> None:
    store.ensure("tiny", source=source)
    path = store.root / "tiny" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    with pytest.raises(ShardError, match=r"manifest\.json"):
        store.open("tiny")


def test_a_directory_without_manifest_is_no_model(store: ShardStore, source: Path) -> None:
    store.ensure("tiny", source=source)
    (store.root / "tiny" / "manifest.json").unlink()

    assert store.list() == ()
    with pytest.raises(ModelNotFound, match="tiny is not in the store"):
        store.open("tiny")
    assert store.ensure("tiny", source=source).name == "tiny"


def test_an_unknown_model_is_not_found_and_what_is_there_is_listed(store: ShardStore, source: Path) -> None:
    store.ensure("tiny", source=source)

    with pytest.raises(ModelNotFound, match="which holds tiny"):
        store.open("owner/absent")
    with pytest.raises(ModelNotFound, match=r"offline.*lamella models pull owner/absent"):
        store.ensure("owner/absent", offline=True)
    with pytest.raises(ModelNotFound, match="no checkpoint at"):
        store.ensure(Path("/nowhere/model"))
    with pytest.raises(ModelNotFound, match="no checkpoint at"):
        store.ensure("absent", source=Path("/nowhere/model"))


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "~/x", "", "x" * 5000, "a\x00b", "a\n"])
def test_a_name_cannot_leave_the_store(name: str, store: ShardStore, source: Path, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}

    for attempt in (
        lambda: store.ensure(name, source=source),
        lambda: store.ensure(name, offline=True),
        lambda: store.open(name),
        lambda: store.remove(name),
        lambda: store.verify(name),
    ):
        with pytest.raises(ModelNameError):
            attempt()

    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_file_that_is_no_checkpoint_is_refused(store: ShardStore, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")

    with pytest.raises(CheckpointError, match=r"neither a checkpoint directory nor a \.gguf file"):
        store.ensure("tiny", source=tmp_path / "notes.txt")


def test_another_dtype_than_the_stored_one_is_refused(store: ShardStore, source: Path) -> None:
    store.ensure("tiny", source=source)

    with pytest.raises(ModelError, match=r"as float32, not as bfloat16.*lamella models remove tiny"):
        store.ensure("tiny", source=source, dtype="bfloat16")
    with pytest.raises(OptionError, match="use one of"):
        store.ensure("tiny", source=source, dtype="int3")

    assert store.ensure("tiny", source=source, dtype="float32").dtype == "float32"


def test_names_that_differ_in_their_separator_are_two_models(
    store: ShardStore, source: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    store.ensure("owner/tiny", source=source)
    store.ensure("owner-tiny", source=tiny_checkpoint("qwen3"))

    assert [manifest.family for manifest in store.list()] == ["qwen3", "llama"]


def test_the_store_is_found_through_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAMELLA_STORE", str(tmp_path / "mine"))
    assert default_store_root() == tmp_path / "mine"

    monkeypatch.setenv("LAMELLA_STORE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_store_root() == tmp_path / ".cache" / "lamella" / "shards"
