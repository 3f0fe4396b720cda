"""Shared fixtures live in `tests/fixtures`, one module a noun."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

# Under a shell that ignores SIGINT for its background jobs, the programs that tests interrupt would ignore it as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.fixtures.models", "tests.fixtures.servers", "tests.side_by_side"]


@pytest.fixture(autouse=True, scope="session")
def shared_memory_left_clean() -> Iterator[None]:
    """Remove what workers that tests killed have left in shared memory; what other processes use stays."""
    yield
    from lamella_engine.shared_memory import reclaim

    reclaim()
