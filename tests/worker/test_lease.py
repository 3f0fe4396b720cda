"""Delivery leases: what the timer touches inside kombu and Celery is still there, and does what it must."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery.worker import state
from celery.worker.request import Request

from lamella.embedded import EmbeddedServer
from lamella.keys import Keys
from lamella.messages import GenerateRequest
from lamella.queue_calls import serve_call
from lamella.registry_calls import submit_call
from lamella_worker.app import make_app
from lamella_worker.config import load_config
from lamella_worker.lease import renew_deliveries
from lamella_worker.model_slots import ModelSlots
from lamella_worker.registry import Registry
from lamella_worker.subscriptions import Subscriptions

KEYS = Keys("lease:")


class Reserved:
    """A request as Celery holds it, reduced to what the timer reads."""

    def __init__(self, message: Any) -> None:
        self.message = message


@pytest.fixture
def registry(embedded_redis: redis.Redis) -> Registry:
    return Registry(embedded_redis, KEYS)


@pytest.fixture
def channel(embedded_server: EmbeddedServer, embedded_redis: redis.Redis, registry: Registry) -> Iterator[Any]:
    flags: dict[str, object] = {"worker.model": "m", "redis.url": embedded_server.url, "redis.prefix": KEYS.prefix}
    config = load_config(None, flags, environ={})
    served = Subscriptions(lambda: config.worker.served, config.slots)
    app = make_app(config, served, ModelSlots(config.slots))
    with app.connection_for_read() as connection:
        yield connection.default_channel


def consumer(channel: Any) -> Any:
    return SimpleNamespace(task_consumer=SimpleNamespace(channel=channel))


def deliver(channel: Any, registry: Registry, job_id: str) -> Any:
    registry.call(serve_call(KEYS, "w", "m", 10))
    registry.call(submit_call(KEYS, job_id, GenerateRequest(model="m", prompt="hello")))
    return channel.basic_get("generate.m")


def test_held_deliveries_are_renewed_and_others_left_to_come_back(
    channel: Any, registry: Registry, embedded_redis: redis.Redis
) -> None:
    held, forgotten = deliver(channel, registry, "a"), deliver(channel, registry, "b")
    index = f"{KEYS.prefix}unacked_index"
    assert set(embedded_redis.zrange(index, 0, -1)) == {"a.1", "b.1"}
    embedded_redis.zadd(index, {"a.1": 1, "b.1": 1})
    request = Reserved(held)
    state.reserved_requests.add(request)

    num_renewed = renew_deliveries(consumer(channel))

    state.reserved_requests.discard(request)
    assert num_renewed == 1
    assert time.time() - embedded_redis.zscore(index, "a.1") < 5
    assert embedded_redis.zscore(index, "b.1") == 1
    forgotten.ack()
    held.ack()


def test_a_delivery_that_is_done_with_is_not_brought_back(
    channel: Any, registry: Registry, embedded_redis: redis.Redis
) -> None:
    message = deliver(channel, registry, "a")
    message.ack()
    request = Reserved(message)
    state.reserved_requests.add(request)

    renew_deliveries(consumer(channel))

    state.reserved_requests.discard(request)
    assert embedded_redis.zcard(f"{KEYS.prefix}unacked_index") == 0


def test_celerys_requests_carry_the_message_the_timer_reads() -> None:
    assert isinstance(Request.message, property)


def test_a_consumer_without_deliveries_or_connection_is_left_alone(channel: Any) -> None:
    assert renew_deliveries(consumer(channel)) == 0
    assert renew_deliveries(SimpleNamespace(task_consumer=None)) == 0
