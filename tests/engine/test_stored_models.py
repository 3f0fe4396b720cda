"""What heartbeats tell of a store: complete models, cheaply, whatever else lies there."""

from __future__ import annotations

import json
from pathlib import Path

from lamella_engine import ShardStore
from lamella_engine.stored_models import MOST_TOLD, StoredModels


def test_complete_models_are_told_with_their_sizes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    stored = StoredModels(tmp_path)
    assert stored.look() == ()
    store.ensure("owner/tiny", source=tiny_llama_dir)
    (tmp_path / "unfinished" / ("0" * 16)).mkdir(parents=True)

    (found,) = stored.look()

    manifest = store.manifest("owner/tiny")
    assert (found.name, found.size_bytes) == ("owner/tiny", manifest.size_bytes)
    assert found.largest_layer_bytes == max(layer.nbytes for layer in manifest.layers)
    store.remove("owner/tiny")
    assert stored.look() == ()


def test_a_damaged_manifest_and_a_missing_store_are_no_obstacle(tmp_path: Path) -> None:
    for name, text in {"a": "{", "b": "[]", "c": '{"layers": 3}', "d": '{"name": "../x"}', "e": "[" * 100_000}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)

    assert StoredModels(tmp_path).look() == ()
    assert StoredModels(tmp_path / "nothing").look() == ()


def test_the_newest_are_told_and_an_unchanged_manifest_is_not_read_again(tmp_path: Path) -> None:
    for number in range(MOST_TOLD + 3):
        (tmp_path / f"m{number}").mkdir()
        manifest = {"name": f"m{number}", "layers": [{"nbytes": 2}], "root": {"nbytes": 1}}
        (tmp_path / f"m{number}" / "manifest.json").write_text(json.dumps(manifest))
    stored = StoredModels(tmp_path)

    first = stored.look()
    second = stored.look()

    assert len(first) == MOST_TOLD
    assert all(one is other for one, other in zip(first, second, strict=True))
