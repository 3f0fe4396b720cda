"""A quota of the store: who goes for whom, and who stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lamella_engine import Engine, EngineOptions, Sampling, ShardStore
from lamella_engine.cli import app
from lamella_engine.errors import DiskFull, ModelError, ShardError
from lamella_engine.model_use import is_in_use, using
from lamella_engine.store_room import QUOTA_FILE
from lamella_engine.stored_form import StoredForm
from tests.engine.engine_driver import generate
from tests.waiting import wait_until

SLACK = 200_000  # bytes, for blocks and bookkeeping
CPU = torch.device("cpu")
HOLDER = """
import sys
from pathlib import Path
from lamella_engine.model_use import using
with using(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def source(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture
def store(source: Path, tmp_path: Path) -> ShardStore:
    """Three models, `a` unused for longest and `c` used last."""
    store = ShardStore(tmp_path / "store")
    for age, name in enumerate(("c", "b", "a")):
        store.ensure(name, source=source)
        use(store, name, age_s=1000.0 * (age + 1))
    return store


@pytest.fixture
def holder(store: ShardStore) -> Iterator[subprocess.Popen[str]]:
    """Another process that has `a` open."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.root), "a"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate(timeout=40)


def use(store: ShardStore, name: str, age_s: float) -> None:
    """Make it look as if the model was built and used `age_s` seconds ago."""
    with using(store.root, name):
        pass
    directory = store.build_directory(store.manifest(name)).parent
    then = directory.stat().st_mtime - age_s
    for path in (store.root / ".locks" / f"{name}.use", directory):
        os.utime(path, (then, then))


def names(store: ShardStore) -> list[str]:
    return [manifest.name for manifest in store.list()]


def taken(store: ShardStore) -> int:
    return sum(each.nbytes for each in store.room.occupants())


def run(store: ShardStore, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--store", str(store.root)])


def test_the_one_unused_for_longest_goes_for_a_new_one(store: ShardStore, source: Path) -> None:
    store.room.set_quota(taken(store) + SLACK)

    store.ensure("d", source=source)

    assert names(store) == ["b", "c", "d"]
    assert taken(store) <= (store.room.quota or 0)


def test_opening_a_model_makes_it_the_last_to_go(store: ShardStore, source: Path) -> None:
    store.room.set_quota(taken(store) + SLACK)
    options = EngineOptions(store=store.root, device="cpu", kv_tokens=64, ram=0)
    with Engine.open_sharded(store.open("a"), CPU, options):
        assert is_in_use(store.root, "a")
    assert not is_in_use(store.root, "a")

    store.ensure("d", source=source)

    assert names(store) == ["a", "c", "d"]


def test_what_is_open_stays_and_answers(store: ShardStore, source: Path) -> None:
    store.room.set_quota(taken(store) + SLACK)
    options = EngineOptions(store=store.root, device="cpu", kv_tokens=64, ram=0)
    with Engine.open_sharded(store.open("a"), CPU, options) as engine:
        before = generate(engine, [5, 9, 13], Sampling(max_tokens=4, ignore_eos=True)).token_ids

        store.ensure("d", source=source)

        assert names(store) == ["a", "c", "d"]
        assert generate(engine, [5, 9, 13], Sampling(max_tokens=4, ignore_eos=True)).token_ids == before


def test_what_another_process_has_open_stays_until_it_ends(
    store: ShardStore, holder: subprocess.Popen[str], source: Path
) -> None:
    assert [each.name for each in store.room.occupants() if each.is_in_use] == ["a"]
    with pytest.raises(ModelError, match="a is in use"):
        store.room.remove("a")

    store.room.shrink(taken(store) - 1)

    assert names(store) == ["a", "c"]
    holder.kill()  # the kernel tells that it is gone
    wait_until(lambda: not is_in_use(store.root, "a"))
    store.room.shrink(0)
    assert names(store) == []


def test_too_small_a_quota_removes_nothing_and_says_what_stays(
    store: ShardStore, holder: subprocess.Popen[str], source: Path
) -> None:
    store.room.set_quota(taken(store) // 3 + 1000)

    with pytest.raises(DiskFull, match=r"in use and to stay: a \(.*Nothing was removed; raise the quota") as refusal:
        store.ensure("d", source=source)

    assert names(store) == ["a", "b", "c"]
    assert refusal.value.needed_bytes > 1000


def test_a_packed_form_is_built_from_a_model_that_stays_for_it(store: ShardStore) -> None:
    store.room.set_quota(taken(store) + SLACK)

    built = store.ensure("a", form=StoredForm(quant="int8"))

    assert names(store) == ["a", built.name, "c"]


def test_without_a_quota_nothing_goes(store: ShardStore, source: Path) -> None:
    store.ensure("d", source=source)

    assert names(store) == ["a", "b", "c", "d"]


def test_what_a_killed_build_left_goes_as_well(store: ShardStore) -> None:
    (store.root / "a" / "manifest.json").unlink()
    os.utime(store.root / "a", (1.0, 1.0))

    store.room.shrink(taken(store) - 1)

    assert not (store.root / "a").exists()
    assert names(store) == ["b", "c"]


def test_a_model_that_is_being_built_stays(store: ShardStore) -> None:
    with store._lock("a").held("a", 1.0):
        store.room.shrink(taken(store) - 1)

    assert names(store) == ["a", "c"]


def test_files_shared_with_an_original_do_not_count(source: Path, tmp_path: Path) -> None:
    copied, placed = ShardStore(tmp_path / "copied"), ShardStore(tmp_path / "placed")
    copied.ensure("m", source=source)

    placed.ensure("m", source=source, form=StoredForm(in_place=True))

    assert taken(placed) < 0.7 * taken(copied)


def test_a_damaged_quota_is_told_and_can_be_set_again(store: ShardStore, source: Path) -> None:
    (store.root / QUOTA_FILE).write_text("plenty")

    with pytest.raises(ShardError, match="says no quota that can be read"):
        store.ensure("d", source=source)

    assert run(store, "quota", "1GiB").exit_code == 0
    assert store.ensure("d", source=source).name == "d"


def test_the_commands(store: ShardStore, holder: subprocess.Popen[str]) -> None:
    none = run(store, "quota")
    assert "no quota is set" in none.output
    assert run(store, "prune").exit_code == 2
    assert run(store, "quota", "40%").exit_code == 2
    listed = run(store, "list").output
    assert "in use" in listed
    assert "16 min ago" in listed

    half = str(taken(store) // 2)
    assert run(store, "quota", half).exit_code == 0
    dry = run(store, "prune", "--dry-run")
    assert (dry.exit_code, names(store)) == (0, ["a", "b", "c"])
    done = run(store, "prune")
    assert dry.output.replace("would remove", "removed") == done.output
    assert names(store) == ["a"]
    assert json.loads(run(store, "quota", "--json").output) == {"quota_bytes": int(half), "taken_bytes": taken(store)}
    assert "nothing has to go" in run(store, "prune").output
    assert run(store, "prune", "--to", "0").exit_code == 1, "what is in use cannot go"
    [told] = json.loads(run(store, "list", "--json").output)
    assert (told["is_in_use"], told["own_bytes"]) == (True, taken(store))
    assert run(store, "quota", "none").exit_code == 0
    assert store.room.quota is None
