"""A real server, a tiny real model, and real workers whose engine is in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella_engine import ShardStore
from tests.faults.workers import Workers
from tests.fixtures.servers import require_embedded

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
