"""Fixtures of the client's tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import redis

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from tests.client.acting_worker import ActingWorker
from tests.client.queue_service import Service
from tests.waiting import wait_until


@pytest.fixture
def client(embedded_server: EmbeddedServer) -> Iterator[Client]:
    """A client of an empty server."""
    with Client(embedded_server.url) as client:
        yield client


@pytest.fixture
def worker(embedded_redis: redis.Redis) -> ActingWorker:
    """An announced worker of that server, which does what tests tell it."""
    worker = ActingWorker(embedded_redis)
    worker.announce()
    return worker


@pytest.fixture
def serving() -> Iterator[Callable[..., None]]:
    """Gives a function that answers the next job of a worker's queue from a thread."""
    threads: list[threading.Thread] = []

    def serve_one(worker: ActingWorker, *texts: str) -> None:
        def serve() -> None:
            assert wait_until(lambda: worker.redis.rpop(worker.keys.queue_list(worker.model)))
            worker.run(worker.redis.zrange(worker.keys.active, 0, 0)[0], *texts)

        thread = threading.Thread(target=serve, name="serving", daemon=True)
        threads.append(thread)
        thread.start()

    yield serve_one
    for thread in threads:
        thread.join(40.0)


@pytest.fixture
def service(fake_redis: redis.Redis) -> Service:
    """A queue whose workers have one slot."""
    service = Service(fake_redis)
    service.serve(1)
    return service
