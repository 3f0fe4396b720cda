"""Fetching models from a hub: which files, which commit, and what each failure says. The hub is on loopback."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from lamella_engine import hub
from lamella_engine.errors import CheckpointError, DiskFull, ModelError, ModelNameError, ModelNotFound
from lamella_engine.shard_store import ShardStore
from tests.engine.fake_hub import FakeHub, serve_hub, use_endpoint

CONFIG = json.dumps({"model_type": "llama"}).encode()
SINGLE = {"config.json": CONFIG, "model.safetensors": b"w" * 5000}
WEIGHT_MAP = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
SHARDED = {
    "config.json": CONFIG,
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"eos_token": null}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": json.dumps({"weight_map": WEIGHT_MAP}).encode(),
    "model-00001-of-00002.safetensors": b"1" * 70_000,
    "model-00002-of-00002.safetensors": b"2" * 30_000,
}
NOT_NEEDED = {
    "pytorch_model.bin": b"pickle",
    "modeling_custom.py": b"code",
    "model.gguf": b"gguf",
    "onnx/model.onnx": b"onnx",
    "consolidated.safetensors": b"double",
    "original/model.pth": b"pickle",
    "README.md": b"words",
}


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub(tmp_path, monkeypatch) as running:
        yield running


def test_only_what_a_model_needs_is_fetched(fake_hub: FakeHub) -> None:
    commit = fake_hub.add("owner/model", SHARDED | NOT_NEEDED)

    snapshot = hub.download("owner/model")

    assert snapshot.revision == commit
    assert fake_hub.fetched_files == set(SHARDED)
    assert {path.name: path.read_bytes() for path in snapshot.directory.iterdir()} == SHARDED


def test_config_comes_without_weights(fake_hub: FakeHub) -> None:
    commit = fake_hub.add("owner/model", SHARDED)

    snapshot = hub.fetch_config("owner/model")

    assert snapshot.revision == commit
    assert (snapshot.directory / "config.json").read_bytes() == CONFIG
    assert fake_hub.fetched_files == {"config.json"}


def test_a_second_download_fetches_nothing(fake_hub: FakeHub) -> None:
    fake_hub.add("owner/model", SHARDED)
    first = hub.download("owner/model")
    fake_hub.fetched.clear()

    second = hub.download("owner/model")

    assert second == first
    assert fake_hub.fetched == []


def test_a_model_without_owner_is_fetched_too(fake_hub: FakeHub) -> None:
    fake_hub.add("gpt2", SINGLE)

    snapshot = hub.download("gpt2")

    assert (snapshot.directory / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]


@pytest.mark.parametrize("digits", [40, 8])
def test_a_named_revision_is_served_after_a_newer_commit(fake_hub: FakeHub, digits: int) -> None:
    old = fake_hub.add("owner/model", SINGLE)
    new = fake_hub.add("owner/model", SINGLE | {"model.safetensors": b"newer"})

    pinned = hub.download(f"owner/model@{old[:digits]}")
    newest = hub.download("owner/model")

    assert (pinned.revision, newest.revision) == (old, new)
    assert (pinned.directory / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]
    assert (newest.directory / "model.safetensors").read_bytes() == b"newer"


def test_progress_grows_to_the_total_in_the_calling_thread(fake_hub: FakeHub) -> None:
    fake_hub.add("owner/model", SHARDED)
    calls: list[tuple[str, int, int]] = []
    threads = set()

    def progress(phase: str, done_bytes: int, total_bytes: int) -> None:
        calls.append((phase, done_bytes, total_bytes))
        threads.add(threading.current_thread())

    hub.download("owner/model", progress=progress)

    total = sum(len(data) for data in SHARDED.values())
    assert calls[-1] == ("download", total, total)
    assert {call[2] for call in calls} == {total}
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)
    assert threads == {threading.current_thread()}


def test_a_cut_connection_resumes_where_it_broke(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)
    fake_hub.add("owner/model", SINGLE)
    fake_hub.cut_once = {"model.safetensors"}

    snapshot = hub.download("owner/model")

    assert (snapshot.directory / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]
    ranges = [wanted for name, wanted in fake_hub.fetched if name == "model.safetensors"]
    assert ranges == [None, "bytes=2500-"]


def test_an_error_in_the_caller_stops_the_download(fake_hub: FakeHub) -> None:
    fake_hub.add("owner/model", SHARDED)

    def progress(phase: str, done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.download("owner/model", progress=progress)

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lamella-hub")]


@pytest.mark.parametrize(("given", "sent"), [("secret-a", "Bearer secret-a"), (None, "Bearer secret-b")])
def test_the_token_given_or_of_the_environment_is_sent(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, given: str | None, sent: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-b")
    fake_hub.add("owner/model", SINGLE)

    hub.download("owner/model", token=given)

    assert set(fake_hub.tokens) == {sent}


def test_a_missing_model_is_not_found(fake_hub: FakeHub) -> None:
    with pytest.raises(ModelNotFound, match=r"no model 'owner/nothing'.*HF_TOKEN"):
        hub.download("owner/nothing")


def test_a_missing_revision_is_not_found(fake_hub: FakeHub) -> None:
    fake_hub.add("owner/model", SINGLE)

    with pytest.raises(ModelNotFound, match="owner/model has no revision 'fffffff'"):
        hub.download("owner/model@fffffff")


def test_a_repository_without_config_is_not_found(fake_hub: FakeHub) -> None:
    fake_hub.add("owner/model", NOT_NEEDED)

    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        hub.fetch_config("owner/model")


def test_a_file_that_the_index_names_and_the_hub_lacks_is_not_found(fake_hub: FakeHub) -> None:
    fake_hub.add("owner/model", {name: data for name, data in SHARDED.items() if "00002-of" not in name})

    with pytest.raises(ModelNotFound, match=r"lacks model-00002-of-00002\.safetensors"):
        hub.download("owner/model")

    assert "model-00001-of-00002.safetensors" not in fake_hub.fetched_files


@pytest.mark.parametrize(
    "index",
    [b"not json", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": "../escape.safetensors"}}',
     b'{"weight_map": {"a": "weights.bin"}}', b'{"weight_map": {"a": ["x"]}}', b'{"weight_map": {"a": 1, "b": "c"}}'],
)  # fmt: skip
def test_a_broken_index_is_refused(fake_hub: FakeHub, index: bytes) -> None:
    fake_hub.add("owner/model", SHARDED | {"model.safetensors.index.json": index})

    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json of owner/model"):
        hub.download("owner/model")


def test_pickled_weights_are_refused(fake_hub: FakeHub) -> None:
    fake_hub.add("owner/model", {"config.json": CONFIG, "pytorch_model.bin": b"pickle"})

    with pytest.raises(CheckpointError, match="only pickled weights"):
        hub.download("owner/model")

    assert "pytorch_model.bin" not in fake_hub.fetched_files


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((403, "GatedRepo", "Access to model owner/model is restricted"), r"gated.*terms.*HF_TOKEN.*hf auth login"),
        ((401, "GatedRepo", "Access to model owner/model is restricted"), r"gated.*terms.*HF_TOKEN.*hf auth login"),
        ((401, "", "Invalid credentials in Authorization header"), r"refuses access.*401.*HF_TOKEN"),
        ((403, "", "Forbidden"), r"refuses access.*403.*HF_TOKEN"),
    ],
)
def test_refused_access_names_the_token(fake_hub: FakeHub, refusal: tuple[int, str, str], words: str) -> None:
    fake_hub.add("owner/model", SINGLE)
    fake_hub.refusals["owner/model"] = refusal

    with pytest.raises(ModelError, match=words):
        hub.download("owner/model")


def test_a_hub_that_is_down_says_what_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_endpoint(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path, monkeypatch)

        with pytest.raises(ModelError, match=r"cannot be reached.*store and local paths work"):
            hub.download("owner/model")


def test_a_hub_that_never_answers_ends_at_the_deadline(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "REQUEST_TIMEOUT_S", 0.3)
    fake_hub.silent = True

    with pytest.raises(ModelError, match="cannot be reached"):
        hub.fetch_config("owner/model")


def test_an_endpoint_that_is_no_hub_is_an_error(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "not-a-url")

    with pytest.raises(ModelError, match="HF_ENDPOINT"):
        hub.fetch_config("owner/model")


@pytest.mark.parametrize("name", ["a/b/c", "owner/", "/model", "owner/mo del", "../model"])
def test_a_name_that_no_hub_has_is_refused(fake_hub: FakeHub, name: str) -> None:
    with pytest.raises(ModelNameError, match="owner/name"):
        hub.download(name)


def test_a_full_disk_is_said_before_weights_are_fetched(fake_hub: FakeHub) -> None:
    fake_hub.add("owner/model", SINGLE)
    fake_hub.claimed_sizes["model.safetensors"] = 10**18

    with pytest.raises(DiskFull, match="HF_HOME") as caught:
        hub.download("owner/model")

    assert caught.value.needed_bytes == 10**18
    assert 0 <= caught.value.free_bytes < 10**18
    assert fake_hub.fetched_files == {"config.json"}


def test_a_pulled_model_needs_the_hub_no_more(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ShardStore(tmp_path / "store")
    with serve_hub(tmp_path, monkeypatch) as running:
        commit = running.add_directory("owner/tiny", tiny_llama_dir)
        store.ensure("owner/tiny")

    again = store.ensure("owner/tiny")

    assert len(again.layers) == 4
    assert store.manifest("owner/tiny").revision == commit


def test_a_family_that_cannot_run_is_refused_before_its_weights_are_fetched(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.add("owner/bert", SINGLE | {"config.json": json.dumps({"model_type": "bert"}).encode()})

    with pytest.raises(ModelError, match=r"bert.*both sides"):
        ShardStore(tmp_path / "store").ensure("owner/bert")

    assert fake_hub.fetched_files == {"config.json"}
