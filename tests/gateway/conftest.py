"""A gateway without keys, one with, and workers behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest
import redis

from lamella.connection import Connection
from lamella.embedded import EmbeddedServer
from lamella_gateway.api_keys import make_key, shown_key, store_key
from tests.client.acting_worker import ActingWorker
from tests.gateway.running_gateway import AnsweringWorker, RunningGateway

MakeKey = Callable[..., str]


@pytest.fixture
def gateway(embedded_server: EmbeddedServer) -> Iterator[RunningGateway]:
    """A gateway that asks for no key."""
    with RunningGateway(embedded_server.url) as gateway:
        yield gateway


@pytest.fixture
def guarded(embedded_server: EmbeddedServer) -> Iterator[RunningGateway]:
    """A gateway that asks for a key."""
    with RunningGateway(embedded_server.url, requires_key=True) as gateway:
        yield gateway


@pytest.fixture
def sdk(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    """The SDK's client of `gateway`."""
    with gateway.client() as client:
        yield client


@pytest.fixture
def worker(embedded_redis: redis.Redis) -> ActingWorker:
    """A worker that does what the test says, step by step."""
    worker = ActingWorker(embedded_redis)
    worker.announce()
    return worker


@pytest.fixture
def answering(embedded_redis: redis.Redis) -> Iterator[AnsweringWorker]:
    """A worker that answers by itself."""
    with AnsweringWorker(embedded_redis) as worker:
        yield worker


@pytest.fixture
def new_key(embedded_server: EmbeddedServer) -> MakeKey:
    """A function that makes an API key: ``new_key(user, **scopes)``."""

    def make(user: str, **scopes: object) -> str:
        key, secret = make_key(user, user, **scopes)
        connection = Connection(embedded_server.url, "lamella:", 10.0)
        connection.run(store_key(connection.keys, key, secret))
        connection.close()
        return shown_key(key, secret)

    return make
