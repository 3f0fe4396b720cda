"""What a store's door gives to whom: files of complete models, and nothing else, to a bounded number of callers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from lamella_engine import ShardStore
from lamella_engine.cli import app
from lamella_engine.errors import OptionError
from lamella_engine.peer_address import PeerAddress, Peers, peer_token
from lamella_engine.peer_server import PeerServer
from tests.waiting import wait_until

NAME = "owner/tiny"
MODEL = "/lamella/1/models/owner%2Btiny"


@pytest.fixture(scope="module")
def store(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardStore:
    store = ShardStore(tmp_path_factory.mktemp("shared"))
    store.ensure(NAME, source=tiny_llama_dir)
    (store.root / "secret.txt").write_text("not shared")
    (store.root / "unfinished" / ("0" * 16)).mkdir(parents=True)
    return store


@pytest.fixture(scope="module")
def server(store: ShardStore) -> Iterator[PeerServer]:
    running = PeerServer(store, "127.0.0.1", 0)
    running.start()
    yield running
    running.close()


def get(server: PeerServer, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    where = urlsplit(server.address)
    with contextlib.closing(http.client.HTTPConnection(str(where.hostname), where.port, timeout=40)) as connection:
        connection.request("GET", path, headers={key.replace("_", "-"): value for key, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def test_it_lists_complete_models_and_sends_what_their_manifests_name(store: ShardStore, server: PeerServer) -> None:
    manifest = store.manifest(NAME)
    record = manifest.layers[1]
    whole = (store.build_directory(manifest) / record.file).read_bytes()

    listed = json.loads(get(server, "/lamella/1/models")[2])["models"]
    sent = json.loads(get(server, f"{MODEL}/manifest")[2])
    status, _, body = get(server, f"{MODEL}/{manifest.build}/{record.file}")
    part_status, headers, part = get(server, f"{MODEL}/{manifest.build}/{record.file}", Range="bytes=1000-")

    assert [each["name"] for each in listed] == [NAME]
    assert sent["build"] == manifest.build
    assert (status, body) == (200, whole)
    assert (part_status, part) == (206, whole[1000:])
    assert headers["Content-Range"] == f"bytes 1000-{len(whole) - 1}/{len(whole)}"


@pytest.mark.parametrize(
    "path",
    [
        "/", "/lamella/1/", "/lamella/1/models/", "/lamella/2/models", "/etc/passwd", "/lamella/1/models/../../etc",
        "/lamella/1/models/%2e%2e/manifest", "/lamella/1/models/..%2f..%2fetc/manifest", "/lamella/1/models/x/manifest",
        "/lamella/1/models/unfinished/manifest", "/lamella/1/models/.locks/manifest", "/lamella/1/models//manifest",
        "/lamella/1/models/secret.txt/manifest", "/lamella/1/models/owner%2Ftiny/manifest",
        f"{MODEL}/BUILD/../../secret.txt", f"{MODEL}/BUILD/..%2F..%2Fsecret.txt", f"{MODEL}/BUILD/checked.json",
        f"{MODEL}/BUILD/%2Fetc%2Fpasswd", f"{MODEL}/BUILD/built.jsonl", f"{MODEL}/../secret.txt",
        f"{MODEL}/%00/config.json", f"{MODEL}/0000000000000000/config.json", f"{MODEL}/BUILD/manifest.json",
    ],
)  # fmt: skip
def test_no_path_leads_to_anything_else(store: ShardStore, server: PeerServer, path: str) -> None:
    status, _, body = get(server, path.replace("BUILD", store.manifest(NAME).build))

    assert status in (400, 404)
    assert b"not shared" not in body
    assert b"root:" not in body


@pytest.mark.parametrize("wanted", ["bytes=999999999-", "bytes=-5", "bytes=0-5", "lines=1-", "bytes=1-,5-"])
def test_a_range_that_is_none_is_refused(store: ShardStore, server: PeerServer, wanted: str) -> None:
    status, _, _ = get(server, f"{MODEL}/{store.manifest(NAME).build}/config.json", Range=wanted)

    assert status == 416


def test_a_damaged_file_and_one_elsewhere_are_not_sent(store: ShardStore, tmp_path: Path) -> None:
    copy = ShardStore(Path(shutil.copytree(store.root, tmp_path / "copy")))
    build = copy.build_directory(copy.manifest(NAME))
    elsewhere = tmp_path / "elsewhere"
    (build / "config.json").rename(elsewhere)
    (build / "config.json").symlink_to(elsewhere)
    with (build / "root.safetensors").open("ab") as file:
        file.write(b"x")
    running = PeerServer(copy, "127.0.0.1", 0)
    running.start()

    linked = get(running, f"{MODEL}/{build.name}/config.json")
    longer = get(running, f"{MODEL}/{build.name}/root.safetensors")
    running.close()

    assert (linked[0], linked[2]) == (409, b"config.json of owner/tiny lies outside the store\n")
    assert longer[0] == 409


def test_a_token_is_asked_for_and_told_to_the_peer_alone(store: ShardStore, tmp_path: Path) -> None:
    running = PeerServer(store, "127.0.0.1", 0, token="open-sesame")
    running.start()
    root = tmp_path / "ours"

    without = get(running, "/lamella/1/models")
    wrong = get(running, f"{MODEL}/manifest", Authorization="Bearer open")
    right = get(running, f"{MODEL}/manifest", Authorization="Bearer open-sesame")
    refused = CliRunner().invoke(
        app, ["pull", NAME, "--from", running.address, "--offline", "--store", str(root)], env={}
    )
    given = CliRunner().invoke(
        app,
        ["pull", NAME, "--from", running.address, "--offline", "--store", str(root)],
        env={"LAMELLA_PEER_TOKEN": "open-sesame"},
    )
    running.close()

    assert (without[0], wrong[0], right[0]) == (401, 401, 200)
    assert refused.exit_code == 1
    assert "asks for a token, and LAMELLA_PEER_TOKEN (or its _FILE) is not set here" in refused.stderr
    assert given.exit_code == 0, given.stderr
    assert "open-sesame" not in given.stderr + given.stdout


def test_more_callers_than_may_be_are_turned_away_and_silent_ones_dropped(store: ShardStore) -> None:
    running = PeerServer(store, "127.0.0.1", 0, at_once=1, silence_s=0.5)
    running.start()
    where = urlsplit(running.address)
    with socket.create_connection((str(where.hostname), where.port), timeout=40) as silent:
        turned_away = wait_until(lambda: get(running, "/lamella/1/models")[0] == 503)
        assert turned_away
        assert silent.recv(1) == b""  # closed by the server

    assert wait_until(lambda: get(running, "/lamella/1/models")[0] == 200)
    running.close()


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:9530", "ftp://host", "http://", "http://host:99999", "http://h/x", "http://h?x", "http://u:p@h"],
)
def test_an_address_that_cannot_be_one_is_refused(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        PeerAddress.parse(text)

    assert "p@h" not in str(caught.value)


def test_peers_come_from_the_environment_and_their_token_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("word\n")

    peers = Peers.from_environment(
        {"LAMELLA_PEERS": "http://a:1, https://[::1]:2/,http://a:1", "LAMELLA_PEER_TOKEN_FILE": str(file)}
    )

    assert [str(each) for each in peers.addresses] == ["http://a:1", "https://[::1]:2"]
    assert peers.token == "word"
    assert "word" not in repr(peers)
    for environ in (
        {"LAMELLA_PEER_TOKEN": "a", "LAMELLA_PEER_TOKEN_FILE": str(file)},
        {"LAMELLA_PEER_TOKEN": "two words"},
        {"LAMELLA_PEER_TOKEN_FILE": str(tmp_path / "none")},
    ):
        with pytest.raises(OptionError):
            peer_token(environ)


def test_the_command_shares_until_it_is_told_to_stop(store: ShardStore, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lamella_engine", "share", "--listen", "127.0.0.1:0", "--store", str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.rpartition(" on ")[2].strip()

        pulled = CliRunner().invoke(
            app, ["pull", NAME, "--from", address, "--offline", "--store", str(tmp_path / "ours")]
        )
        process.send_signal(signal.SIGTERM)

        assert process.wait(40) == 0
    assert line.startswith("sharing 1 models")
    assert pulled.exit_code == 0, pulled.stderr
    assert f"{NAME} is ready: 4 layers" in pulled.stdout


def test_wrong_calls_say_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = CliRunner().invoke(app, ["share", "--listen", f"127.0.0.1:{taken.getsockname()[1]}"])
    portless = CliRunner().invoke(app, ["share", "--listen", "127.0.0.1"])
    nobody = CliRunner().invoke(app, ["pull", NAME, "--from", "peer", "--store", os.fspath(tmp_path)])

    assert "give another address or port" in busy.stderr
    assert "use HOST:PORT" in portless.stderr
    assert "http://HOST:PORT" in nobody.stderr
    assert {busy.exit_code, portless.exit_code, nobody.exit_code} == {2}
