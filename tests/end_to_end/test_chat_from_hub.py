"""One command on a machine that has nothing: the model is fetched by name, built, served, asked, and all is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lamella_engine import ShardStore
from tests.engine.fake_hub import serve_hub
from tests.processes import processes_naming


def chat(tmp_path: Path, model: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "LAMELLA_STORE": str(tmp_path / "store"),
        "LAMELLA_STATE_DIR": str(tmp_path / "state"),
        "HF_TOKEN": "hf_sesame",
    }
    environment.pop("LAMELLA_REDIS_URL", None)
    return subprocess.run(
        [*(sys.executable, "-m", "lamella", "chat", "--model", model, "--device", "cpu"),
         *("--max-tokens", "6", *options, "Hello")],
        env=environment, capture_output=True, text=True, timeout=100, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_chat_fetches_a_model_by_name_and_answers(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub(tmp_path, monkeypatch) as hub, tempfile.TemporaryDirectory(prefix="lam-") as scratch:
        monkeypatch.setenv("TMPDIR", scratch)  # a short path, for the socket of a server may be no longer
        commit = hub.add_directory("owner/tiny", tiny_llama_dir)

        result = chat(tmp_path, "owner/tiny", "--stats")

        left = [path.name for path in Path(scratch).iterdir() if path.name.startswith("lamella-")]

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "%" in result.stderr, "fetching and building show how far they are"
    assert ShardStore(tmp_path / "store").manifest("owner/tiny").revision == commit
    assert "model.safetensors" in hub.fetched_files
    assert "Bearer hf_sesame" in hub.tokens
    for figure in ("tokens/s", "streamed per token", "peak memory"):
        assert figure in result.stderr
    assert processes_naming(str(tmp_path / "state")) == [], "the service that it brought is taken away"
    assert left == []


@pytest.mark.slow  # what becomes of a revision that is named, tests/engine/test_hub.py holds without a chat
def test_chat_pins_the_revision_that_is_named(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub(tmp_path, monkeypatch) as hub:
        commit = hub.add_directory("owner/tiny", tiny_llama_dir)
        hub.add("owner/tiny", {"config.json": b"{}"})
        name = f"owner/tiny@{commit[:12]}"

        result = chat(tmp_path, name)

    assert result.returncode == 0, result.stderr
    assert ShardStore(tmp_path / "store").manifest(name).revision == commit
