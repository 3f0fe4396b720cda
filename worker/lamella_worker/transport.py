"""Kombu's Redis transport, made to survive a lost connection with deliveries in hand, and junk in a queue.

Owns three repairs. When the broker goes away, Celery first collects the connection and then closes its channel, which
tries to give deliveries back over the connection that is no longer there; the AttributeError of that, and the one of
an acknowledgement that comes later still, end the consumer for good. Here both are let go: such a delivery comes back
by itself after the visibility timeout, and the claim of its job then says that it is held or done. And a queue entry
that is no Celery message at all would end the consumer too; here it is dropped. Last, a server that refuses for a while
(it is full, a replica during a failover, or cannot write to its disk) ended the consumer and with it the worker; here a
refusal counts as a lost connection, and `consumer` connects again until the server takes what it is asked. And a rule:
queues that are named in the option `FULL_QUEUES` are left alone, so that one model's jobs do not take the places of
another's. And a saving: kombu makes a client object for each command, which takes longer than the command.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from kombu.utils.scheduling import round_robin_cycle as RoundRobin
from redis.exceptions import ResponseError

from lamella_worker.failpoints import pass_point

log = logging.getLogger(__name__)

FULL_QUEUES = "full_queues"  # the transport option, a list that changes; of plain names, because monitors are shown it
NAME = "lamella"  # the transport's name in broker URLs


class Deliveries(kombu_redis.QoS):
    """Unacknowledged deliveries of one channel, forgotten here once the channel has lost its connection."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note a message, which has just left its queue, as a delivery."""
        pass_point("taken")
        super().append(message, delivery_tag)  # type: ignore[no-untyped-call]  # kombu has few types

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a delivery."""
        if self._is_connected("acknowledged"):
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]  # as above

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Drop a delivery, or put it back into its queue."""
        if self._is_connected("rejected"):
            super().reject(delivery_tag, requeue=requeue)  # type: ignore[no-untyped-call]  # as above

    def restore_unacked(self, client: Any = None) -> Any:
        """Put every delivery back into its queue."""
        if self._is_connected("restored"):
            return super().restore_unacked(client)  # type: ignore[no-untyped-call]  # as above
        self._delivered.clear()
        return None

    def _is_connected(self, what: str) -> bool:
        transport = self.channel.connection
        if transport is not None and transport.client is not None:
            return True
        log.info("a delivery is not %s: its connection is gone; it comes back after the visibility timeout", what)
        return False


class Channel(kombu_redis.Channel):
    """A channel whose deliveries outlive its connection, and that drops what is no message."""

    QoS = Deliveries

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._kept_client: Any = None
        super().__init__(*arguments, **options)  # type: ignore[no-untyped-call]  # as above

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """A client of the channel's pool, always the same while the pool is; or `client`."""
        if client is None and (self._kept_client is None or self._kept_client.connection_pool is not self.pool):
            self._kept_client = self._create_client()  # type: ignore[no-untyped-call]  # as above
        yield self._kept_client if client is None else client

    def _brpop_start(self, timeout: float | None = None) -> None:
        full = self.connection.client.transport_options.get(FULL_QUEUES, ())
        queues = self._queue_cycle.consume(len(self.active_queues))
        open_queues = [queue for queue in queues if queue not in full]
        if len(open_queues) == len(queues):
            super()._brpop_start(timeout)  # type: ignore[no-untyped-call]  # as above
            return
        if not open_queues:
            return  # asked again at the loop's next turn
        every, self._queue_cycle = self._queue_cycle, RoundRobin(open_queues)  # type: ignore[no-untyped-call]  # as above
        try:
            super()._brpop_start(timeout)  # type: ignore[no-untyped-call]  # as above
        finally:
            self._queue_cycle = every

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # as above
        except (ValueError, TypeError, KeyError, AttributeError):
            log.exception("a queue entry that is no Celery message is dropped; who else writes to this queue?")
            return None


class Transport(kombu_redis.Transport):
    """The Redis transport with such channels; known to kombu as `NAME`."""

    Channel = Channel
    connection_errors = (*kombu_redis.Transport.connection_errors, ResponseError)


TRANSPORT_ALIASES.setdefault(NAME, f"{__name__}:Transport")
