"""Shards that are damaged, removed or cannot be built while real engines use them: never a wrong text."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella.messages import JobState
from lamella_engine import ShardStore
from tests.faults.oracle import Undisturbed, assert_as_if_nothing_was, undisturbed
from tests.faults.workers import Workers
from tests.waiting import wait_until

MODEL = "tiny"
pytestmark = pytest.mark.timeout(300)  # several engines are opened
NAME = "w1"
FAILPOINTS = "sweep=slow@1+"
OPTIONS: dict[str, object] = {"max_tokens": 200, "temperature": 0.8, "seed": 11}


@pytest.fixture(scope="module")
def source(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the shards are built from; tests may move it away for a while."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path_factory.mktemp("source") / "model"))


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    ShardStore(root).ensure(MODEL, source=source)
    return root


@pytest.fixture(scope="module")
def calm(workers: Workers) -> Undisturbed:
    workers.start(MODEL, NAME, failpoints=FAILPOINTS)
    with Client(workers.url) as client:
        return undisturbed(client, MODEL, "The river runs", **OPTIONS)


@pytest.fixture
def worker(workers: Workers, calm: Undisturbed) -> str:
    """A worker that reads its layers from disk in every sweep; tests leave one behind that does."""
    return workers.start(MODEL, NAME, failpoints=FAILPOINTS)


def layer_of(store: Path) -> Path:
    return next(store.glob(f"{MODEL}/*/layer-00002.safetensors"))


def flip(path: Path) -> None:
    """Change one byte in the middle of a file, in place."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))


@pytest.mark.parametrize("damage", ["flip", pytest.param("cut", marks=pytest.mark.faults)])
def test_a_shard_altered_under_a_running_job_is_built_again_and_the_text_is_right(
    client: Client, workers: Workers, store: Path, calm: Undisturbed, worker: str, damage: str
) -> None:
    """Fault 17: the sweep that reads it fails, the engine opens anew, the file is set aside and made again."""
    restarts = workers.engine(worker).restarts
    job = calm.submit(client)
    wait_until(lambda: job.status().events >= 20)

    path = layer_of(store)
    flip(path) if damage == "flip" else os.truncate(path, path.stat().st_size // 2)

    assert_as_if_nothing_was(job, calm, attempts=2)
    assert workers.engine(worker).restarts == restarts + 1
    ShardStore(store).verify(MODEL)
    assert [found.name for found in store.glob(f".damaged/{MODEL}/*")] == [path.name]


def test_a_shard_that_cannot_be_built_again_is_told_and_the_job_waits(
    client: Client, workers: Workers, store: Path, source: Path, calm: Undisturbed
) -> None:
    """Fault 17 without a source: no worker serves the model, nothing wrong is said, and what is mended goes on."""
    workers.stop(NAME)
    flip(layer_of(store))
    elsewhere = source.with_name("elsewhere")
    source.rename(elsewhere)

    with pytest.raises(AssertionError, match=r"layer-00002\.safetensors.*SHA-256 differs"):
        workers.start(MODEL, NAME)

    job = calm.submit(client)
    assert job.status().state is JobState.QUEUED
    elsewhere.rename(source)
    workers.start(MODEL, NAME, failpoints=FAILPOINTS)
    assert_as_if_nothing_was(job, calm, attempts=1)


def test_shards_deleted_under_a_running_job_change_nothing_for_it(
    client: Client, workers: Workers, store: Path, calm: Undisturbed, worker: str
) -> None:
    """Fault 18: open files stay readable; a later start builds what is gone."""
    job = calm.submit(client)
    wait_until(lambda: job.status().events >= 20)

    for layer in store.glob(f"{MODEL}/*/layer-*.safetensors"):
        layer.unlink()

    assert_as_if_nothing_was(job, calm, attempts=1)
    assert_as_if_nothing_was(calm.submit(client), calm, attempts=1)
    workers.stop(worker)
    workers.start(MODEL, worker, failpoints=FAILPOINTS)
    assert_as_if_nothing_was(calm.submit(client), calm, attempts=1)


ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from lamella import Client
from lamella_engine import ShardStore
from lamella_engine.errors import DiskFull
disk, source, url, logs = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
from tests.faults.workers import Workers
store = ShardStore(disk)
store.ensure("old", source=source)
workers = Workers(url, disk, logs)
workers.start("old", "w1")
ask = dict(model="old", max_tokens=20, ignore_eos=True)
with Client(url) as client:
    before = client.generate("The river runs", timeout_s=60, **ask).text
    ballast = disk / "ballast"
    def fill(phase, done, total):
        if phase == "build" and done > 0.4 * total and not ballast.exists():
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True: file.write(bytes(4096))
                except OSError:
                    pass
    try:
        store.ensure("new", source=source, progress=fill)
    except DiskFull as error:
        print("full", error.needed_bytes > error.free_bytes)
    print(client.generate("The river runs", timeout_s=60, **ask).text == before, workers.engine("w1").restarts)
    store.verify("old")
    workers.stop("w1")
    workers.start("old", "w1")
    print(client.generate("The river runs", timeout_s=60, **ask).text == before)
workers.close()
"""


def test_a_disk_that_fills_up_while_building_harms_no_model_that_is_served(
    tiny_llama_dir: Path, tmp_path: Path, own_server: EmbeddedServer
) -> None:
    """Fault 16: on a disk of its own; the build says so, the old model is served on, also by a new worker."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=4096k none '{disk}' && exec \"$@\""
    private = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if not shutil.which("unshare") or subprocess.run([*private, "true"], capture_output=True, timeout=10).returncode:
        pytest.skip("private mounts are not permitted here")

    ran = subprocess.run(
        [
            *private,
            sys.executable,
            "-c",
            ON_A_SMALL_DISK,
            str(disk),
            str(tiny_llama_dir),
            own_server.url,
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        cwd=Path(__file__).resolve().parent.parent.parent,
    )

    assert ran.stdout.split() == ["full", "True", "True", "0", "True"], ran.stderr
