"""A real server, a tiny real model, real worker processes, and the client library."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella_engine import ShardStore
from tests.end_to_end.fleet import Fleet
from tests.fixtures.servers import require_embedded

SOLO, PAIR = "tiny-solo", "tiny-pair"  # one model under two names: served by one worker, and by two


@pytest.fixture(scope="session")
def session_server() -> Iterator[EmbeddedServer]:
    """A server of their own, because their workers live on and would answer for those of other tests."""
    require_embedded()
    with tempfile.TemporaryDirectory(prefix="lamella-") as directory, EmbeddedServer(Path(directory) / "d") as server:
        yield server


@pytest.fixture(scope="session")
def tiny_store(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for name in (SOLO, PAIR):
        ShardStore(root).ensure(name, source=tiny_llama_dir)
    return root


@pytest.fixture(scope="session")
def fleet(
    session_server: EmbeddedServer, tiny_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    fleet = Fleet(session_server.url, tiny_store, tmp_path_factory.mktemp("logs"))
    yield fleet
    fleet.close()


@pytest.fixture
def client(session_server: EmbeddedServer) -> Iterator[Client]:
    with Client(session_server.url) as client:
        yield client


@pytest.fixture
def solo(fleet: Fleet, client: Client) -> str:
    """The name of a model that exactly one worker serves."""
    fleet.serve(client, SOLO, 1)
    return SOLO


@pytest.fixture
def pair(fleet: Fleet, client: Client) -> list[str]:
    """The names of the two workers that serve the model PAIR."""
    return fleet.serve(client, PAIR, 2)
