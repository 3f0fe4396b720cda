"""Which files of a repository hold the weights: told by the listing, else by headers, before any weight is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lamella_engine import hub
from lamella_engine.errors import CheckpointError, ModelError
from lamella_engine.shard_store import ShardStore
from tests.engine.fake_hub import FakeHub, serve_hub

CONFIG = json.dumps({"model_type": "llama"}).encode()
INDEX = json.dumps({"weight_map": {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}}).encode()


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub(tmp_path, monkeypatch) as running:
        yield running


def _file(*tensors: str) -> bytes:
    """A safetensors file of more than a hub sends of it at once if it is asked for the header."""
    return save({name: torch.zeros(100_000) for name in tensors})


TENSORS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
WHOLE = _file(*TENSORS)
OWN_LAYOUT = _file("tok_embeddings.weight", "layers.0.attention.wq.weight")


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ({"pytorch_model.safetensors": WHOLE}, {"pytorch_model.safetensors"}),
        ({"gptq_model-4bit-128g.safetensors": WHOLE, "README.md": b""}, {"gptq_model-4bit-128g.safetensors"}),
        ({"consolidated.safetensors": WHOLE}, {"consolidated.safetensors"}),
        ({"a.safetensors": WHOLE, "consolidated.safetensors": WHOLE}, {"a.safetensors"}),
        ({"a.safetensors": WHOLE, "adapter_model.safetensors": WHOLE, "sub/b.safetensors": WHOLE}, {"a.safetensors"}),
        ({"model.safetensors": WHOLE, "model.fp16.safetensors": WHOLE}, {"model.safetensors"}),
        ({"a.safetensors": WHOLE, "pytorch_model.bin": b"pickle"}, {"a.safetensors"}),
        (
            {"p-0.safetensors": _file(TENSORS[0]), "p-1.safetensors": _file(*TENSORS[1:]), "original.pth": b""},
            {"p-0.safetensors", "p-1.safetensors"},
        ),
        (
            {
                "gptq.safetensors.index.json": INDEX,
                "x-00001-of-00002.safetensors": b"1",
                "x-00002-of-00002.safetensors": b"2",
                "y.safetensors": b"not named",
            },
            {"gptq.safetensors.index.json", "x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"},
        ),
    ],
)
def test_weights_of_unusual_names_are_fetched_once(
    files: dict[str, bytes], chosen: set[str], fake_hub: FakeHub
) -> None:
    fake_hub.add("owner/model", {"config.json": CONFIG} | files)

    snapshot = hub.download("owner/model")

    assert {path.name for path in snapshot.directory.iterdir()} == chosen | {"config.json"}
    assert {name for name, wanted in fake_hub.fetched if wanted is None} == chosen | {"config.json"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"a.safetensors": WHOLE, "b.safetensors": WHOLE},
            r"owner/model holds 2 safe.*a\.safetensors and b\.safetensors",
        ),
        ({"a.safetensors": _file("x", "y"), "b.safetensors": _file("y")}, "'y'.*directory of their own"),
        ({"a.safetensors.index.json": b"{}", "b.safetensors.index.json": b"{}"}, "2 indexes, a.*b.*cannot be told"),
        ({"consolidated.safetensors": OWN_LAYOUT}, "Mistral's own consolidated format only"),
        ({"consolidated-1.safetensors": OWN_LAYOUT, "consolidated-2.safetensors": b"?"}, "Mistral's own"),
        ({"adapter_model.safetensors": WHOLE}, "adapter"),
        ({"sub/model.safetensors": WHOLE}, "no safetensors file"),
        (
            {"a.safetensors": b"<html>", "b.safetensors": WHOLE},
            r"owner/model/a\.safetensors is not a whole safetensors",
        ),
        ({"a.safetensors": b"\x10", "b.safetensors": WHOLE}, r"a\.safetensors is not a whole safetensors"),
        ({"a.safetensors": b"\x10" + 7 * b"\0" + b"{", "b.safetensors": WHOLE}, "ends inside its header"),
    ],
)
@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_weights_that_cannot_be_chosen_are_refused_before_they_are_fetched(
    files: dict[str, bytes], words: str, ignores_ranges: bool, fake_hub: FakeHub
) -> None:
    fake_hub.add("owner/model", {"config.json": CONFIG} | files)
    fake_hub.ignores_ranges = ignores_ranges

    with pytest.raises(CheckpointError, match=words):
        hub.download("owner/model")

    assert {name for name, wanted in fake_hub.fetched if wanted is None} == {"config.json"}


def test_a_header_of_many_tensors_is_read_whole(fake_hub: FakeHub) -> None:
    parts = [save({f"{part}.{number}": torch.zeros(1) for number in range(4000)}) for part in "ab"]
    fake_hub.add("owner/model", {"config.json": CONFIG, "a.safetensors": parts[0], "b.safetensors": parts[1]})

    snapshot = hub.download("owner/model")

    assert (snapshot.directory / "b.safetensors").read_bytes() == parts[1]


def test_the_token_is_sent_for_headers_as_well(fake_hub: FakeHub) -> None:
    fake_hub.add("owner/model", {"config.json": CONFIG, "a.safetensors": _file("a"), "b.safetensors": _file("b")})

    hub.download("owner/model", token="secret")

    assert set(fake_hub.tokens) == {"Bearer secret"}
    assert [name for name, wanted in fake_hub.fetched if wanted] == ["a.safetensors", "b.safetensors"]


def test_a_hub_that_stops_answering_before_a_header_ends_at_the_deadline(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": CONFIG, "a.safetensors": _file("a"), "b.safetensors": _file("b")}
    monkeypatch.setattr(hub, "REQUEST_TIMEOUT_S", 0.5)
    fake_hub.add("owner/model", files)
    fake_hub.silent_on = {"a.safetensors"}

    with pytest.raises(ModelError, match="cannot be reached"):
        hub.download("owner/model")


def test_refused_access_to_a_header_names_the_token(fake_hub: FakeHub) -> None:
    fake_hub.add("owner/model", {"config.json": CONFIG, "a.safetensors": WHOLE, "b.safetensors": WHOLE})
    hub.fetch_config("owner/model")
    fake_hub.refusals["owner/model"] = (403, "GatedRepo", "Access to model owner/model is restricted")

    with pytest.raises(ModelError, match=r"gated.*HF_TOKEN"):
        hub.download("owner/model")


@pytest.mark.parametrize("name", ["consolidated.safetensors", "pytorch_model.safetensors"])
def test_a_model_with_a_file_of_an_unusual_name_is_pulled(
    name: str, fake_hub: FakeHub, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_llama_dir.iterdir()}
    files[name] = files.pop("model.safetensors")
    fake_hub.add("owner/tiny", files)

    assert len(ShardStore(tmp_path / "store").ensure("owner/tiny").layers) == 4
