"""The broker's connection leaves the queues of models alone that have enough, and only those."""

from __future__ import annotations

import redis
from kombu import Consumer

from lamella.embedded import EmbeddedServer
from lamella.keys import Keys
from lamella.messages import GenerateRequest
from lamella.queue_calls import serve_call
from lamella.registry_calls import submit_call
from lamella_worker.app import make_app
from lamella_worker.config import load_config
from lamella_worker.model_slots import ModelSlots
from lamella_worker.registry import Registry
from lamella_worker.subscriptions import Subscriptions, make_queue
from tests.waiting import wait_until

KEYS = Keys("full:")


def test_messages_of_a_full_queue_stay_there_until_it_is_full_no_more(
    embedded_server: EmbeddedServer, embedded_redis: redis.Redis
) -> None:
    registry, slots = Registry(embedded_redis, KEYS), ModelSlots(1)
    flags: dict[str, object] = {"worker.models": ("a", "b"), "redis.url": embedded_server.url, "redis.prefix": "full:"}
    config = load_config(None, flags, environ={})
    app = make_app(config, Subscriptions(lambda: ("a", "b"), 1), slots)
    for model in ("a", "b"):
        registry.call(serve_call(KEYS, "w", model, 10))
        for number in range(3):
            registry.call(submit_call(KEYS, f"{model}{number}", GenerateRequest(model=model, prompt="hello")))
    taken: list[str] = []

    def take(body: object, message: object) -> None:
        taken.append(message.headers["id"])  # type: ignore[attr-defined]  # kombu has few types
        message.ack()  # type: ignore[attr-defined]  # as above

    def drained(*expected: str) -> bool:
        try:
            connection.drain_events(timeout=0.2)
        except TimeoutError:
            return sorted(taken) == sorted(expected)
        return False

    slots.full.append("generate.a")
    queues = [make_queue("generate.a"), make_queue("generate.b")]
    with app.connection_for_read() as connection, Consumer(connection, queues, callbacks=[take]):
        wait_until(lambda: drained("b0", "b1", "b2"))
        slots.full.clear()
        wait_until(lambda: drained("a0", "a1", "a2", "b0", "b1", "b2"))
