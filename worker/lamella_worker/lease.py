"""Keeps Celery's deliveries ours while their jobs run: kombu never renews a delivery by itself.

Owns one timer on the consumer. It touches kombu's internals (`unacked_index_key`, `conn_or_acquire`) and Celery's
`reserved_requests`; a contract test holds them in place, and kombu is pinned below 5.8.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from celery import bootsteps
from celery.worker import state
from redis.exceptions import RedisError

log = logging.getLogger(__name__)


class DeliveryLease(bootsteps.StartStopStep):  # type: ignore[misc]  # celery publishes no types
    """Re-scores every reserved delivery each third of the visibility timeout, so that it is not delivered again."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Start the timer; called again after each reconnect."""
        timeout_s = consumer.app.conf.broker_transport_options["visibility_timeout"]
        self._timer = consumer.timer.call_repeatedly(timeout_s / 3, renew_deliveries, (consumer,))

    def stop(self, consumer: Any) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def renew_deliveries(consumer: Any) -> int:
    """Re-score the deliveries this consumer holds and return how many were asked for."""
    tags = [request.message.delivery_tag for request in list(state.reserved_requests)]
    if not tags or consumer.task_consumer is None:
        return 0
    channel = consumer.task_consumer.channel
    now = time.time()  # the same clock as kombu's own scores
    try:
        with channel.conn_or_acquire() as client:
            client.zadd(channel.unacked_index_key, dict.fromkeys(tags, now), xx=True)
    except (RedisError, *channel.connection_errors) as error:
        log.warning("%d deliveries are not renewed: %s", len(tags), error)
    return len(tags)
