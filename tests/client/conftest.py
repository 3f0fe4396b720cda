"""Fixtures of the client's tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from tests.client.acting_worker import ActingWorker
from tests.waiting import wait_until


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
