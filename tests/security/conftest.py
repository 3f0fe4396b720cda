"""A closed server and one worker on it, shared by the tests that only use them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella.acl import Role
from lamella.client import Client
from lamella_engine import ShardStore
from tests.fixtures.servers import require_embedded
from tests.security.secured_server import PASSWORDS, SecuredServer, secured_server
from tests.security.secured_worker import MODEL, PREFIX, SecuredWorker


@pytest.fixture(scope="session")
def guarded_store(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guarded-store")
    ShardStore(root).ensure(MODEL, source=tiny_llama_dir)
    return root


@pytest.fixture(scope="session")
def secured() -> Iterator[SecuredServer]:
    """One closed server for the whole run."""
    require_embedded()
    with tempfile.TemporaryDirectory(prefix="lam-") as directory, secured_server(Path(directory), PREFIX) as server:
        yield server


@pytest.fixture(scope="session")
def guarded_worker(
    secured: SecuredServer, guarded_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecuredWorker]:
    """A worker whose password is in a file, and nowhere else."""
    directory = tmp_path_factory.mktemp("guarded")
    password = directory / "worker.password"
    password.write_text(PASSWORDS[Role.WORKER] + "\n")
    environment = {
        "LAMELLA_REDIS_URL": secured.bare_url(Role.WORKER),
        "LAMELLA_REDIS_PASSWORD_FILE": str(password),
    }
    worker = SecuredWorker(guarded_store, directory / "worker.log", environment)
    worker.start()
    try:
        worker.wait_until_served(secured.url(Role.CLIENT))
        yield worker
    finally:
        worker.stop()


@pytest.fixture
def client(secured: SecuredServer) -> Iterator[Client]:
    with Client(secured.url(Role.CLIENT), prefix=PREFIX) as client:
        yield client
