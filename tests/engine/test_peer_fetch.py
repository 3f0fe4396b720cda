"""Models from another host's store: whole and proved, however the way there fails, or not at all."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lamella_engine import ShardStore
from lamella_engine.errors import DiskFull, ModelNotFound
from lamella_engine.peer_address import Patience, Peers
from lamella_engine.peer_server import PeerServer
from lamella_engine.progress import FETCH
from lamella_engine.stored_form import StoredForm
from tests.engine.fake_hub import serve_hub
from tests.engine.faulty_peer import (
    FaultyPeer,
    cut_after,
    dripping,
    faulty_peer,
    flipped,
    hanging,
    instead,
    refusing,
    shorter,
    silent,
)
from tests.engine.shards import Steps, stored_weights

NAME = "owner/tiny"
LAYER = "layer-00002.safetensors"
PATIENCE = Patience(retries=3, pause_s=0.01)
RETRIES = PATIENCE.retries


@pytest.fixture(scope="module")
def theirs(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardStore:
    """The other host's store."""
    store = ShardStore(tmp_path_factory.mktemp("theirs"))
    store.ensure(NAME, source=tiny_llama_dir)
    return store


@pytest.fixture(scope="module")
def sharing(theirs: ShardStore) -> Iterator[PeerServer]:
    server = PeerServer(theirs, "127.0.0.1", 0)
    server.start()
    yield server
    server.close()


@pytest.fixture
def peer(sharing: PeerServer) -> Iterator[FaultyPeer]:
    with faulty_peer(sharing.address) as running:
        yield running


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "ours"


def store_with(root: Path, *addresses: str, patience: Patience = PATIENCE) -> ShardStore:
    return ShardStore(root, peers=replace(Peers.named(addresses, {}), patience=patience))


def refused(root: Path, *addresses: str, patience: Patience = PATIENCE, **options: object) -> str:
    """What is said where no peer helps and the hub is not asked; nothing may be visible then."""
    store = store_with(root, *addresses, patience=patience)
    with pytest.raises(ModelNotFound) as caught:
        store.ensure(NAME, offline=True, **options)  # type: ignore[arg-type]
    assert not store.has(NAME)
    assert store.list() == ()
    return str(caught.value)


def same_weights(one: ShardStore, other: ShardStore, name: str = NAME) -> bool:
    left, right = stored_weights(one.open(name)), stored_weights(other.open(name))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_fetched_model_is_the_peers_to_the_last_byte(root: Path, theirs: ShardStore, sharing: PeerServer) -> None:
    steps = Steps()
    ours = store_with(root, sharing.address)

    model = ours.ensure(NAME, offline=True, progress=steps)

    assert same_weights(ours, theirs)
    assert ours.verify(NAME).files == theirs.manifest(NAME).files
    assert sorted(path.name for path in model.directory.parent.iterdir()) == [model.directory.name, "manifest.json"]
    done = [each[1] for each in steps.calls if each[0] == FETCH]
    assert done == sorted(done)
    assert done[-1] == sum(record.nbytes for record in theirs.manifest(NAME).files)


def test_a_model_that_is_here_is_not_asked_for(root: Path, peer: FaultyPeer) -> None:
    store_with(root, peer.address).ensure(NAME, offline=True)
    asked = len(peer.asked)

    store_with(root, peer.address).ensure(NAME, offline=True)

    assert len(peer.asked) == asked


def test_a_cut_file_goes_on_where_it_was_cut(root: Path, theirs: ShardStore, peer: FaultyPeer) -> None:
    peer.faults[LAYER] = [cut_after(1000), cut_after(500)]

    ours = store_with(root, peer.address)
    ours.ensure(NAME, offline=True)

    assert same_weights(ours, theirs)
    assert peer.ranges_of(LAYER) == [None, "bytes=1000-", "bytes=1500-"]


def test_a_fetch_that_was_given_up_goes_on_later(root: Path, theirs: ShardStore, peer: FaultyPeer) -> None:
    peer.faults[LAYER] = [cut_after(100)] * (RETRIES + 1)
    assert "closed the connection" in refused(root, peer.address)
    peer.asked.clear()

    ours = store_with(root, peer.address)
    ours.ensure(NAME, offline=True)

    assert same_weights(ours, theirs)
    assert [file for file, _ in peer.asked][:2] == ["manifest", LAYER]  # what had come before is not asked for again
    assert peer.ranges_of(LAYER) == [f"bytes={100 * (RETRIES + 1)}-"]


def test_the_next_peer_goes_on_where_the_last_one_ended(
    root: Path, theirs: ShardStore, sharing: PeerServer, peer: FaultyPeer
) -> None:
    peer.faults[LAYER] = [cut_after(100)] * (RETRIES + 1)
    with faulty_peer(sharing.address) as second:
        ours = store_with(root, peer.address, second.address)
        ours.ensure(NAME, offline=True)

        assert second.ranges_of(LAYER) == [f"bytes={100 * (RETRIES + 1)}-"]
    assert same_weights(ours, theirs)


def test_wrong_bytes_are_never_visible_and_the_next_peer_helps(
    root: Path, theirs: ShardStore, sharing: PeerServer, peer: FaultyPeer, caplog: pytest.LogCaptureFixture
) -> None:
    peer.faults[LAYER] = [flipped]
    said = refused(root, peer.address)
    peer.faults[LAYER] = [flipped]

    ours = store_with(root, peer.address, sharing.address)
    with caplog.at_level(logging.WARNING):
        ours.ensure(NAME, offline=True)

    assert LAYER in said
    assert "SHA-256 differs" in said
    assert "SHA-256 differs" in caplog.text
    assert same_weights(ours, theirs)


def test_a_wrong_beginning_is_not_blamed_on_the_peer_that_ends_it(
    root: Path, theirs: ShardStore, sharing: PeerServer, peer: FaultyPeer
) -> None:
    peer.faults[LAYER] = [cut_wrongly(1000), refusing(500)]

    ours = store_with(root, peer.address, sharing.address)
    ours.ensure(NAME, offline=True)

    assert same_weights(ours, theirs)


def cut_wrongly(nbytes: int) -> Callable[..., None]:
    return lambda handler, answer, body: cut_after(nbytes)(handler, answer, b"wrong" + body[5:])


def test_a_body_that_is_too_short_is_named(root: Path, peer: FaultyPeer) -> None:
    peer.faults[LAYER] = [shorter]

    said = refused(root, peer.address)

    assert f"bytes of {LAYER} where its manifest leaves" in said


def test_a_peer_without_ranges_starts_a_file_over(root: Path, theirs: ShardStore, peer: FaultyPeer) -> None:
    whole = (theirs.build_directory(theirs.manifest(NAME)) / LAYER).read_bytes()

    def ignoring(handler: object, answer: object, body: bytes) -> None:
        handler.send_response(200)  # type: ignore[attr-defined]
        handler.send_header("Content-Length", str(len(whole)))  # type: ignore[attr-defined]
        handler.end_headers()  # type: ignore[attr-defined]
        handler.wfile.write(whole)  # type: ignore[attr-defined]

    peer.faults[LAYER] = [cut_after(1000), ignoring]

    ours = store_with(root, peer.address)
    ours.ensure(NAME, offline=True)

    assert same_weights(ours, theirs)


@pytest.mark.parametrize(("fault", "file"), [(silent, "manifest"), (hanging, LAYER), (dripping, LAYER)])
def test_a_peer_that_hangs_is_given_up(root: Path, peer: FaultyPeer, fault: object, file: str) -> None:
    peer.faults[file] = [fault] * (RETRIES + 1)  # type: ignore[list-item]
    impatient = replace(PATIENCE, answer_s=0.3, silence_s=0.3, least_bytes=1 << 20)

    said = refused(root, peer.address, patience=impatient)

    assert "hangs" in said or "too slow" in said


def test_a_peer_that_is_not_there_is_passed_by(root: Path, theirs: ShardStore, sharing: PeerServer) -> None:
    ours = store_with(root, "http://127.0.0.1:1", sharing.address)

    ours.ensure(NAME, offline=True)

    assert same_weights(ours, theirs)


def _changed(**changes: object) -> Callable[[bytes], bytes]:
    return lambda body: json.dumps({**json.loads(body), **changes}).encode()


def _second_root(body: bytes) -> bytes:
    manifest = json.loads(body)
    return json.dumps({**manifest, "companions": [*manifest["companions"], manifest["root"]]}).encode()


def _stamps(body: bytes) -> bytes:
    manifest = json.loads(body)
    return json.dumps({**manifest, "companions": [{**manifest["root"], "file": "checked.json"}]}).encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            _changed(format_version=2),
            "another format of owner/tiny than this version reads: it has format 2, this is 1",
        ),
        (_changed(name="owner/other"), "sends 'owner/other' instead of owner/tiny"),
        (_changed(quant="nf4"), "another format of owner/tiny: nf4"),
        (_changed(build="../../etc"), "build is not a directory name"),
        (_changed(root={"file": "../x", "nbytes": 1, "sha256": "0" * 64}), "is not a file of the model"),
        (_second_root, "lists files of owner/tiny twice"),
        (_stamps, "that a store keeps for itself"),
        (lambda body: b"<html>", "it cannot be read"),
        (lambda body: b"[" * 100_000, "it cannot be read"),
    ],
)
def test_a_manifest_that_is_not_the_one_wanted_is_refused(
    root: Path, peer: FaultyPeer, change: Callable[[bytes], bytes], words: str
) -> None:
    peer.faults["manifest"] = [instead(change)]

    said = refused(root, peer.address)

    assert words in said
    assert [file for file, _ in peer.asked] == ["manifest"]
    assert [path for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts] == []


def test_another_dtype_or_revision_is_refused(root: Path, sharing: PeerServer, theirs: ShardStore) -> None:
    assert "another format of owner/tiny: float32, not bfloat16" in refused(root, sharing.address, dtype="bfloat16")
    pinned = f"{NAME}@{'a' * 40}"
    shutil.copytree(theirs.root / "owner+tiny", theirs.root / f"owner+tiny@{'a' * 40}")
    manifest = theirs.root / f"owner+tiny@{'a' * 40}" / "manifest.json"
    manifest.write_bytes(_changed(name=pinned, revision="b" * 40)(manifest.read_bytes()))

    with pytest.raises(ModelNotFound, match="from the commit bbb"):
        store_with(root, sharing.address).ensure(pinned, offline=True)
    shutil.rmtree(manifest.parent)


def test_packed_forms_come_as_they_are(root: Path, theirs: ShardStore, sharing: PeerServer) -> None:
    theirs.ensure(NAME, form=StoredForm(quant="int8,layers.0-1=bf16"))
    packed = next(manifest.name for manifest in theirs.list() if "~" in manifest.name)

    ours = store_with(root, sharing.address)
    model = ours.ensure(packed, offline=True)

    assert model.name == packed
    assert ours.verify(packed).quant == theirs.manifest(packed).quant


def test_a_model_read_in_place_becomes_a_copy(
    root: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source"))
    theirs = ShardStore(tmp_path / "theirs")
    theirs.ensure("placed", source=source, form=StoredForm(in_place=True))
    assert theirs.manifest("placed").originals
    server = PeerServer(theirs, "127.0.0.1", 0)
    server.start()

    ours = store_with(root, server.address)
    ours.ensure("placed", offline=True)
    server.close()

    assert same_weights(ours, theirs, "placed")


def test_the_hub_is_asked_when_no_peer_helps(
    root: Path, peer: FaultyPeer, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    peer.faults[LAYER] = [flipped]
    with serve_hub(tmp_path, monkeypatch) as hub, caplog.at_level(logging.WARNING):
        hub.add_directory(NAME, tiny_llama_dir)
        ours = store_with(root, peer.address)
        ours.ensure(NAME)

    assert ours.verify(NAME).source_kind == "hub"
    assert "no peer gave owner/tiny" in caplog.text
    assert list(root.rglob("*.fetch")) == []


def test_a_quota_is_kept_and_told_before_anything_is_fetched(
    root: Path, peer: FaultyPeer, tiny_checkpoint: Callable[[str], Path]
) -> None:
    store = store_with(root, peer.address)
    store.room.set_quota(10_000)
    with pytest.raises(DiskFull, match="raise the quota"):
        store.ensure(NAME, offline=True)
    assert [file for file, _ in peer.asked] == ["manifest"]
    store.room.set_quota(None)
    store.ensure("older", source=tiny_checkpoint("llama"))
    store.room.set_quota(1_000_000)

    store.ensure(NAME, offline=True)

    assert [manifest.name for manifest in store.list()] == [NAME]


def test_several_workers_of_a_host_fetch_once(root: Path, peer: FaultyPeer) -> None:
    gate = threading.Barrier(4)

    def ensure() -> str:
        gate.wait(40)
        return store_with(root, peer.address).ensure(NAME, offline=True).name

    with ThreadPoolExecutor(4) as pool:
        names = [future.result(40) for future in [pool.submit(ensure) for _ in range(4)]]

    assert names == [NAME] * 4
    assert len(peer.ranges_of(LAYER)) == 1
