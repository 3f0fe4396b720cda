"""Which Celery queues the worker consumes, and with how many threads: those of the models that it serves now.

Owns one timer on the consumer, in whose loop alone queues may change. It touches Celery's internals (the pool's limit
and its prefetch count, the executor's); a contract test holds them in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.concurrency.thread import TaskPool
from kombu.entity import Queue

from lamella.keys import queue_name
from lamella_worker.model_slots import celery_concurrency

log = logging.getLogger(__name__)

TICK_S = 0.5


class ThreadPool(TaskPool):  # type: ignore[misc]  # celery publishes no types
    """Celery's pool of threads, whose limit may change; threads there are already stay until the worker ends."""

    def resize(self, limit: int) -> None:
        """Run at most `limit` tasks at once from now on, or as many as there are threads already."""
        self.limit = limit
        self.executor._max_workers = limit


class Subscriptions:
    """What is consumed follows what is served.

    Args:
        names: asks for the models that are served.
        slots: jobs of a model that run at once.
    """

    def __init__(self, names: Callable[[], tuple[str, ...]], slots: int) -> None:
        self._names = names
        self._slots = slots

    def follow(self, consumer: Any) -> None:
        """Change the consumer's queues and threads where they are not as they should be; in the consumer's loop."""
        names = self._names()
        wanted = {queue_name(name) for name in names}
        if consumer.task_consumer is None:
            return  # it connects again, and then consumes what is selected
        selected = set(consumer.app.amqp.queues.consume_from)
        for queue in sorted(selected - wanted):
            consumer.cancel_task_queue(queue)
        for queue in sorted(wanted - selected):
            consumer.app.amqp.queues.select_add(make_queue(queue))
            consumer.add_task_queue(queue)
        limit = celery_concurrency(self._slots, len(names))
        if more := limit - consumer.pool.limit:
            consumer.pool.resize(limit)
            consumer._update_prefetch_count(more)
        if selected != wanted:
            log.info("queues now: %s", ", ".join(sorted(wanted)))


def make_queue(name: str) -> Queue:
    """A queue as clients' scripts fill it."""
    return Queue(name, routing_key=name)  # type: ignore[no-untyped-call]  # kombu has few types


class SubscriptionStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery publishes no types
    """Lets the consumer follow; the app carries what it follows as `lamella_subscriptions`."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Start the timer; called again after each reconnect."""
        self._timer = consumer.timer.call_repeatedly(TICK_S, consumer.app.lamella_subscriptions.follow, (consumer,))

    def stop(self, consumer: Any) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
