"""Building: once however many ask, resumed after any end, in bounded memory, and never on a disk that is too small."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lamella_engine import ShardStore
from lamella_engine.errors import CheckpointError, ModelError, ModelNotFound
from lamella_engine.shard import ShardedModel
from tests import tiny_models
from tests.engine.shards import Steps, stored_weights


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "store")


@pytest.fixture
def source(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint directory that the test may change."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "source"))


def test_many_at_once_build_once(store: ShardStore, source: Path) -> None:
    steps = [Steps() for _ in range(6)]
    start = threading.Barrier(6)

    def ensure(progress: Steps) -> ShardedModel:
        start.wait(timeout=40)
        return ShardStore(store.root).ensure("tiny", source=source, progress=progress)

    with ThreadPoolExecutor(6) as pool:
        models = list(pool.map(ensure, steps))

    assert len(set(models)) == 1
    assert sum("build" in item.phases for item in steps) == 1


def test_waiting_for_a_builder_ends_with_its_name(source: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "store", build_wait_s=0.2)
    building, finish = threading.Event(), threading.Event()

    def hold(phase: str, done_bytes: int, total_bytes: int) -> None:
        building.set()
        assert finish.wait(timeout=30)

    with ThreadPoolExecutor(1) as pool:
        builder = pool.submit(store.ensure, "tiny", source=source, progress=hold)
        try:
            assert building.wait(timeout=30)
            with pytest.raises(ModelError, match=rf"process {os.getpid()} on .* wait for it or end it"):
                store.ensure("tiny", source=source)
            with pytest.raises(ModelError, match=f"process {os.getpid()}"):
                store.remove("tiny")
        finally:
            finish.set()
        assert builder.result(timeout=30).name == "tiny"


def test_an_interrupted_build_goes_on_where_it_was(
    store: ShardStore, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(phase: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes > 0.7 * total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.ensure("tiny", source=source, progress=interrupt)
    assert not store.has("tiny")
    finished = {path.name: path.stat().st_ino for path in store.root.glob("tiny/*/*.safetensors")}
    assert finished
    assert not list(store.root.glob("tiny/*/*.part"))

    with caplog.at_level(logging.INFO, logger="lamella_engine"):
        model = store.ensure("tiny", source=source)

    assert f"{len(finished)} of 5 shards are built" in caplog.text
    assert {path.name: path.stat().st_ino for path in model.directory.glob("*.safetensors")}.items() >= finished.items()
    store.verify("tiny")


def test_a_half_built_shard_is_not_trusted(store: ShardStore, source: Path) -> None:
    reference = store.ensure("whole", source=source)

    def interrupt(phase: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes > 0.7 * total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.ensure("tiny", source=source, progress=interrupt)
    for path in store.root.glob("tiny/*/*.safetensors"):
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    resumed = store.ensure("tiny", source=source)

    assert [path.read_bytes() for path in (resumed.root.path, resumed.layers[0].path)] == [
        path.read_bytes() for path in (reference.root.path, reference.layers[0].path)
    ]


def test_a_resumed_build_never_mixes_two_sources(store: ShardStore, source: Path) -> None:
    def interrupt(phase: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes > 0.7 * total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.ensure("tiny", source=source, progress=interrupt)
    tiny_models.save_tiny_llama(source, seed=1)

    model = store.ensure("tiny", source=source)

    fresh = store.ensure("fresh", source=source)
    left, right = stored_weights(model), stored_weights(fresh)
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert len(list((store.root / "tiny").iterdir())) == 2


def test_a_source_that_changes_while_it_is_read_is_refused(store: ShardStore, source: Path) -> None:
    def meddle(phase: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes:
            os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        store.ensure("tiny", source=source, progress=meddle)

    assert not (store.root / "tiny").exists()


def test_a_source_that_is_cut_while_it_is_read_leaves_nothing(store: ShardStore, source: Path) -> None:
    def cut(phase: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes:
            os.truncate(source / "model.safetensors", 100_000)

    with pytest.raises(CheckpointError, match=r"model\.safetensors ends .* early"):
        store.ensure("tiny", source=source, progress=cut)

    assert not (store.root / "tiny").exists()


def test_what_a_killed_build_left_can_be_removed(store: ShardStore, source: Path) -> None:
    def interrupt(phase: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.ensure("tiny", source=source, progress=interrupt)

    store.remove("tiny")

    assert not (store.root / "tiny").exists()
    with pytest.raises(ModelNotFound):
        store.remove("tiny")
