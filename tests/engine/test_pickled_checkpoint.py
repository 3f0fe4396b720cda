"""Pickled weights: only on demand, in a process of their own, and never anything but tensors."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lamella_engine import Engine, EngineOptions, ShardStore
from lamella_engine.cli import app
from lamella_engine.errors import CheckpointError, DiskFull, ModelNotFound
from lamella_engine.pickled_checkpoint import PickledCheckpoint
from lamella_engine.progress import silent
from lamella_engine.safetensors_header import FILE_DTYPES
from lamella_engine.unpickle import Refused, checked_tensors
from tests.engine.shards import stored_weights

State = dict[str, torch.Tensor]


@pytest.fixture
def tensors(tiny_llama_dir: Path) -> State:
    return load_file(tiny_llama_dir / "model.safetensors")


@pytest.fixture
def directory(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint directory whose weights are still to be written."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "pickled", ignore=ignored))


@pytest.mark.parametrize("is_archive", [True, False], ids=["archive", "legacy"])
def test_a_pickle_that_is_allowed_gives_the_same_shards(
    is_archive: bool, directory: Path, tensors: State, tmp_path: Path
) -> None:
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=is_archive)
    store = ShardStore(tmp_path / "store")

    model = store.import_pickled("tiny", directory)

    built = stored_weights(model)
    assert built.keys() == tensors.keys()
    assert all(torch.equal(built[name], tensors[name]) for name in tensors)
    _assert_nothing_is_left(store, models=1)


def test_an_index_says_which_pickle_holds_what(directory: Path, tensors: State, tmp_path: Path) -> None:
    names = sorted(tensors)
    parts = {"weights-b.bin": names[::2], "weights-a.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: tensors[name] for name in held}, directory / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    built = stored_weights(ShardStore(tmp_path / "store").import_pickled("tiny", directory))

    assert all(torch.equal(built[name], tensors[name]) for name in tensors)


def test_tied_transposed_and_wrapped_tensors_are_written_as_what_they_are(
    directory: Path, tensors: State, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    state = tensors | {
        name: tensors[name].t().contiguous().t(),
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.norm.weight": torch.nn.Parameter(tensors["model.norm.weight"]),
    }
    torch.save(state, directory / "pytorch_model.bin")

    built = stored_weights(ShardStore(tmp_path / "store").import_pickled("tiny", directory))

    assert torch.equal(built[name], tensors[name])
    assert torch.equal(built["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(built["model.norm.weight"], tensors["model.norm.weight"])


def test_a_second_import_finds_the_first_but_for_a_pickle_that_was_written_again(
    directory: Path, tensors: State, tmp_path: Path
) -> None:
    torch.save(tensors, directory / "pytorch_model.bin")
    store = ShardStore(tmp_path / "store")
    first = store.import_pickled("tiny", directory)
    built_at = store.manifest("tiny").built_at

    again, by_name = store.import_pickled("tiny", directory), store.ensure("tiny")

    assert store.manifest("tiny").built_at == built_at
    assert again.directory == by_name.directory == first.directory

    name = "model.norm.weight"
    torch.save(tensors | {name: tensors[name] + 1}, directory / "pytorch_model.bin")

    assert torch.equal(stored_weights(store.import_pickled("tiny", directory))[name], tensors[name] + 1)


def test_no_pickle_is_opened_without_being_allowed(directory: Path, tensors: State, tmp_path: Path) -> None:
    torch.save(tensors, directory / "pytorch_model.bin")
    store = ShardStore(tmp_path / "store")

    for ask in (
        lambda: store.ensure("tiny", source=directory),
        lambda: store.ensure(directory),
        lambda: Engine.open(directory, EngineOptions(store=tmp_path / "store", device="cpu")),
    ):
        with pytest.raises(CheckpointError, match=r"a pickle, which could run code.*--allow-pickle"):
            ask()

    _assert_nothing_is_left(store, models=0)


class _Planted:
    """Unpickled, it would call `function` on `arguments`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


@pytest.mark.parametrize("kind", ["archive", "legacy"])
def test_a_malicious_pickle_is_not_run_and_leaves_nothing(
    kind: str, directory: Path, tensors: State, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    state = tensors | {"planted": _Planted(os.mkdir, str(ran))}
    torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "archive")
    store = ShardStore(tmp_path / "store")

    with pytest.raises(CheckpointError, match=r"asks for \w+\.mkdir to be called|damaged or no pickle of tensors"):
        store.import_pickled("tiny", directory)

    assert not ran.exists()
    _assert_nothing_is_left(store, models=0)


@pytest.mark.parametrize("kept", [0, 0.99])
def test_a_truncated_pickle_is_refused_and_leaves_nothing(
    kept: float, directory: Path, tensors: State, tmp_path: Path
) -> None:
    torch.save(tensors, directory / "whole")
    whole = (directory / "whole").read_bytes()
    (directory / "whole").unlink()
    (directory / "pytorch_model.bin").write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    store = ShardStore(tmp_path / "store")

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: it is damaged or no pickle"):
        store.import_pickled("tiny", directory)

    _assert_nothing_is_left(store, models=0)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ([torch.zeros(2)], "it holds list, not a table"),
        ({}, "it holds dict, not a table"),
        ({"a": {"b": torch.zeros(2)}}, "'a' is dict, not a tensor"),
        ({1: torch.zeros(2)}, "entry 1 is Tensor, not a tensor under a name"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "sparse"),
        ({"a": torch.zeros(1).expand(1 << 40)}, "larger than the data that it is made of"),
    ],
)
def test_what_is_no_state_dict_is_refused(state: object, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        checked_tensors(state, dict(FILE_DTYPES))


def test_a_refusal_reaches_the_caller_and_leaves_nothing(directory: Path, tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], directory / "pytorch_model.bin")
    store = ShardStore(tmp_path / "store")

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: it holds list, not a table of tensors"):
        store.import_pickled("tiny", directory)

    _assert_nothing_is_left(store, models=0)


def test_a_packed_archive_cannot_grow_past_the_limits(directory: Path, tensors: State, tmp_path: Path) -> None:
    shared = torch.zeros(1 << 20)
    torch.save({f"alias.{number}": shared for number in range(200)}, directory / "pytorch_model.bin")
    store = ShardStore(tmp_path / "store")

    with pytest.raises(CheckpointError, match=r"within its limits"):
        store.import_pickled("tiny", directory)

    _assert_nothing_is_left(store, models=0)


def test_a_compressed_archive_is_refused(directory: Path, tensors: State, tmp_path: Path) -> None:
    torch.save(tensors, directory / "whole")
    with (
        zipfile.ZipFile(directory / "whole") as whole,
        zipfile.ZipFile(directory / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    (directory / "whole").unlink()

    with pytest.raises(CheckpointError, match="its archive is compressed"):
        ShardStore(tmp_path / "store").import_pickled("tiny", directory)


def test_an_index_that_its_files_do_not_match_is_refused(directory: Path, tensors: State, tmp_path: Path) -> None:
    torch.save(tensors, directory / "part.bin")
    weight_map = dict.fromkeys([*tensors, "model.extra.weight"], "part.bin")
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    store = ShardStore(tmp_path / "store")

    with pytest.raises(CheckpointError, match=r"'model\.extra\.weight'"):
        store.import_pickled("tiny", directory)

    _assert_nothing_is_left(store, models=0)


def test_what_a_killed_conversion_left_is_replaced_and_can_be_removed(
    directory: Path, tensors: State, tmp_path: Path
) -> None:
    torch.save(tensors, directory / "pytorch_model.bin")
    store = ShardStore(tmp_path / "store")
    for name in ("tiny", "other"):
        left = store.root / ".converted" / name
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(b"half of it")

    assert len(store.import_pickled("tiny", directory).layers) == 4
    assert store.remove("other") == len(b"half of it")

    assert not list(store.root.glob(".converted/*"))


def test_a_directory_without_pickles_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "store")

    with pytest.raises(CheckpointError, match="no pickle to allow"):
        store.import_pickled("tiny", tiny_llama_dir)
    with pytest.raises(ModelNotFound):
        store.import_pickled("tiny", tmp_path / "absent")


def test_a_place_without_room_is_refused_before_a_pickle_is_opened(directory: Path, tmp_path: Path) -> None:
    with (directory / "pytorch_model.bin").open("wb") as file:
        file.truncate(1 << 43)
    place = tmp_path / "place"

    with pytest.raises(DiskFull), PickledCheckpoint.open(directory).converted(place, silent):
        pass

    assert not place.exists()


def test_the_command_imports_what_it_is_told_to_trust(directory: Path, tensors: State, tmp_path: Path) -> None:
    torch.save(tensors, directory / "pytorch_model.bin")
    call = ["import", "tiny", str(directory), "--store", str(tmp_path / "store")]

    refused, done = CliRunner().invoke(app, call), CliRunner().invoke(app, [*call, "--allow-pickle"])

    assert refused.exit_code == 1
    assert "--allow-pickle" in refused.output
    assert done.exit_code == 0
    assert "tiny is ready: 4 layers" in done.output
    assert CliRunner().invoke(app, [*call, "--allow-pickle", "--delete-original"]).exit_code == 2


def _assert_nothing_is_left(store: ShardStore, *, models: int) -> None:
    left = [entry for entry in store.root.iterdir() if entry.name != ".locks"] if store.root.exists() else []
    assert len(left) == models
