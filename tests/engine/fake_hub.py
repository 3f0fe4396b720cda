"""A model hub on loopback: the few requests the hub library makes, and the ways in which they fail."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import close_session


@dataclass
class FakeHub:
    """What the hub serves, set by the test, and what was asked of it.

    Attributes:
        repositories: name -> commits, oldest first, each a hash and its files.
        refusals: repository name -> status, error code and message of every answer on its files.
        claimed_sizes: file name -> size the listing claims instead of the true one.
        cut_once: files whose next download breaks off in the middle.
        ignores_ranges: set it to answer every request for a part with the whole file.
        silent_on: files that requests wait for until the hub stops.
        silent: set it to let requests wait until the hub stops.
        tokens: the Authorization header of each request, in order.
        fetched: (file, Range header) of each file download, in order.
    """

    endpoint: str = ""
    repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    cut_once: set[str] = field(default_factory=set)
    ignores_ranges: bool = False
    silent_on: set[str] = field(default_factory=set)
    silent: bool = False
    tokens: list[str | None] = field(default_factory=list)
    fetched: list[tuple[str, str | None]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def add(self, repository: str, files: dict[str, bytes]) -> str:
        """Commit `files` as the newest revision of `repository`; return the commit."""
        commits = self.repositories.setdefault(repository, [])
        commit = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits.append((commit, files))
        return commit

    def add_directory(self, repository: str, directory: Path) -> str:
        """Commit all files of `directory`."""
        return self.add(repository, {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()})

    def find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that `revision` (a hash, its start, or ``main``) means."""
        commits = self.repositories[repository]
        if revision == "main":
            return commits[-1]
        return next((found for found in commits if found[0].startswith(revision)), None)

    @property
    def fetched_files(self) -> set[str]:
        """Names of the files that were downloaded."""
        return {name for name, _ in self.fetched}


@contextmanager
def serve_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Run a fake hub; the hub library uses it, a cache of its own under `tmp_path`, and no saved token."""
    hub = FakeHub()
    server = _Server(hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="fake-hub")
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    use_endpoint(hub.endpoint, tmp_path, monkeypatch)
    try:
        yield hub
    finally:
        hub.stopped.set()
        close_session()
        server.shutdown()
        thread.join(timeout=40)
        server.server_close()


def use_endpoint(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the hub library at `endpoint`, with an empty cache and no token."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: FakeHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none; it has read what it needs."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    @property
    def hub(self) -> FakeHub:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `fetched` instead."""

    def _answer(self) -> None:
        self.hub.tokens.append(self.headers.get("Authorization"))
        if self.hub.silent or self.path.rpartition("/")[2] in self.hub.silent_on:
            self.hub.stopped.wait(timeout=30)
            self.close_connection = True
            return
        path = self.path.partition("?")[0].removeprefix("/")
        if path.startswith("api/models/"):
            self._model(path.removeprefix("api/models/"))
        else:
            self._file(path)

    def _model(self, path: str) -> None:
        repository, _, revision = path.partition("/revision/")
        if repository not in self.hub.repositories:
            if self.headers.get("Authorization"):
                return self._refuse(404, "RepoNotFound", "Repository not found")
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        found = self.hub.find(repository, revision or "main")
        if found is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = found
        siblings = [
            {"rfilename": name, "size": self.hub.claimed_sizes.get(name, len(data))} for name, data in files.items()
        ]
        body = json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode()
        self._send(200, {"Content-Type": "application/json"}, body)

    def _file(self, path: str) -> None:
        repository, _, place = path.partition("/resolve/")
        revision, _, name = place.partition("/")
        if repository in self.hub.refusals:
            return self._refuse(*self.hub.refusals[repository])
        found = self.hub.find(repository, revision) if repository in self.hub.repositories else None
        if found is None or name not in found[1]:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        commit, data = found[0], found[1][name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
        status, body, wanted = 200, data, self.headers.get("Range")
        if wanted is not None and self.command == "GET" and not self.hub.ignores_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)) + 1, len(data))
            status, body = 206, data[begin:end]
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        if self.command == "GET":
            self.hub.fetched.append((name, wanted))
        self._send(status, headers, body, cut=self.command == "GET" and name in self.hub.cut_once)
        self.hub.cut_once -= {name} if self.command == "GET" else set()

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": message}, b"")

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True
