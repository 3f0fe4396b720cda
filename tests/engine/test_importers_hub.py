"""Repositories of imported families: what is fetched of them, and what never is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella_engine import ShardStore
from lamella_engine.errors import UnsupportedModel
from lamella_engine.inspection import inspect
from lamella_engine.text import load_codec
from tests.engine.fake_hub import FakeHub, serve_hub
from tests.engine.published_models import PUBLISHED
from tests.engine.vocabularies import QWEN_PIECES, ids_by_rank, save_ranks, train_ranks


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub(tmp_path, monkeypatch) as hub:
        yield hub


def test_a_repository_is_fetched_with_its_vocabulary_and_without_its_code(fake_hub: FakeHub, tmp_path: Path) -> None:
    source = PUBLISHED["QWen"].save(tmp_path / "source")
    ranks = train_ranks()
    save_ranks(source / "qwen.tiktoken", ranks)
    for name in ("modeling_qwen.py", "tokenization_qwen.py", "cpp_kernels.py"):
        (source / name).write_text("raise SystemExit('run')")
    fake_hub.add_directory("owner/QWen", source)

    sharded = ShardStore(tmp_path / "store").ensure("owner/QWen")

    assert fake_hub.fetched_files == {"config.json", "model.safetensors", "qwen.tiktoken"}
    codec = load_codec(sharded.directory)
    assert codec is not None
    assert codec.encode_prompt("The river") == ids_by_rank("The river", ranks, QWEN_PIECES)


def test_a_refused_family_is_refused_before_its_weights_are_fetched(fake_hub: FakeHub, tmp_path: Path) -> None:
    source = PUBLISHED["ChatGLM2"].save(tmp_path / "source", padded_vocab_size=None)
    fake_hub.add_directory("owner/chatglm-6b", source)

    with pytest.raises(UnsupportedModel, match="both directions"):
        ShardStore(tmp_path / "store").ensure("owner/chatglm-6b")

    assert fake_hub.fetched_files == {"config.json"}


def test_a_repository_is_inspected_by_its_config_alone(fake_hub: FakeHub, tmp_path: Path) -> None:
    source = PUBLISHED["ChatGLM3 32k"].save(tmp_path / "source")
    fake_hub.add_directory("owner/chatglm3", source)
    store = ShardStore(tmp_path / "store")

    facts = inspect("owner/chatglm3", store)

    assert fake_hub.fetched_files == {"config.json"}
    assert (facts.imported_from, facts.family, facts.obstacle) == ("ChatGLM2/3", "glm", None)
    assert facts.layers_bytes == inspect(source, store).layers_bytes
