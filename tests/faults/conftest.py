"""A real server, a tiny real model, and real workers whose engine is in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella_engine import ShardStore
from tests.faults.tcp_proxy import TcpProxy
from tests.faults.workers import Workers
from tests.fixtures.servers import require_embedded
from tests.worker.scripted_fleet import ScriptedFleet

MODEL = "tiny"


@pytest.fixture(scope="session")
def store(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    ShardStore(root).ensure(MODEL, source=tiny_llama_dir)
    return root


@pytest.fixture(scope="module")
def workers(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Workers of one module's tests; each test asks for those that it wants."""
    require_embedded()
    with EmbeddedServer(Path(os.path.realpath(tmp_path_factory.mktemp("s"))) / "d") as server:
        workers = Workers(server.url, store, tmp_path_factory.mktemp("logs"))
        yield workers
        workers.close()


@pytest.fixture
def client(workers: Workers) -> Iterator[Client]:
    with Client(workers.url) as client:
        yield client


@pytest.fixture
def fleet(own_server: EmbeddedServer, tmp_path: Path) -> Iterator[ScriptedFleet]:
    """Workers around the scripted engine, on a server that the test may disturb."""
    fleet = ScriptedFleet(own_server.url, tmp_path)
    yield fleet
    fleet.close()


@pytest.fixture
def near(own_server: EmbeddedServer) -> Iterator[Client]:
    """A client of that server."""
    with Client(own_server.url) as client:
        yield client


@pytest.fixture
def admin(own_server: EmbeddedServer) -> Iterator[redis.Redis]:
    """A plain connection to that server, to do things to it."""
    with redis.Redis.from_url(own_server.url, protocol=2, decode_responses=True, socket_timeout=40) as admin:
        yield admin


@pytest.fixture
def proxy(own_server: EmbeddedServer) -> Iterator[TcpProxy]:
    """A network before that server."""
    with TcpProxy(own_server.socket_path) as proxy:
        yield proxy
