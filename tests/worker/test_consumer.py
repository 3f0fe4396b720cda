"""The consumer's own: events about tasks are published several at once, also after a lost connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from celery.worker.consumer import Consumer
from kombu.asynchronous import Hub

from lamella_worker.consumer import EVENTS_S, PatientConsumer

WAIT_S = 10.0


class Loop:
    """A consumer in its event loop, and how often it published."""

    def __init__(self) -> None:
        self.published: list[float] = []
        self.hub = Hub()
        self.consumer = PatientConsumer.__new__(PatientConsumer)
        self.consumer._is_flush_due = False
        self.consumer.hub = self.hub
        self.consumer.event_dispatcher = SimpleNamespace(flush=lambda: self.published.append(time.monotonic()))

    def run(self, seconds: float) -> None:
        """Turn for a while, as the main thread of a worker does."""
        self.hub.call_later(seconds, self.hub.stop)
        self.hub.run_forever()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.hub.close()


def test_events_of_many_threads_are_published_once_and_soon(loop: Loop) -> None:
    began = time.monotonic()
    threads = [threading.Thread(target=loop.consumer.on_send_event_buffered) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)

    loop.run(2 * EVENTS_S)

    assert len(loop.published) in (1, 2)  # two if a thread was interrupted between looking and noting
    assert loop.published[0] - began >= EVENTS_S


def test_an_event_after_a_publication_is_published_too(loop: Loop) -> None:
    for _ in range(3):
        loop.consumer.on_send_event_buffered()
        loop.run(2 * EVENTS_S)

    assert len(loop.published) == 3


def test_a_lost_connection_with_a_publication_due_does_not_end_them(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Consumer, "on_close", lambda self: None)
    loop.consumer.on_send_event_buffered()
    loop.hub.reset()  # as Celery does, which forgets what was to be called

    loop.consumer.on_close()
    loop.consumer.on_send_event_buffered()
    loop.run(2 * EVENTS_S)

    assert loop.published
