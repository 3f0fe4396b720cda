"""A Celery app that only looks on: for Flower and for Celery's own inspection commands.

Owns nothing but the connection: same broker, same key prefix as the workers, no queues and no tasks. It is named on a
command line, so its settings come from the environment: ``LAMELLA_REDIS_URL`` and ``LAMELLA_REDIS_PASSWORD`` (each also
as a file, with ``_FILE``), and ``LAMELLA_PREFIX``.

    celery -A lamella_worker.monitor flower --address=127.0.0.1 --read_only=True
    celery -A lamella_worker.monitor inspect ping
"""

from __future__ import annotations

import os

from celery import Celery

from lamella.keys import DEFAULT_PREFIX
from lamella.secret_sources import URL_VARIABLE, secret_from, with_password
from lamella_worker.app import BROKER_TIMEOUT_S, VISIBILITY_TIMEOUT_S, broker_ssl, broker_url
from lamella_worker.config import DEFAULT_REDIS_URL


def make_monitor(url: str, prefix: str) -> Celery:
    """Return an app that sees the workers of one prefix on the server at `url`."""
    monitor = Celery("lamella", set_as_current=False)
    monitor.conf.update(
        broker_url=broker_url(url),
        broker_use_ssl=broker_ssl(url),
        result_backend=None,
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            "global_keyprefix": prefix,
            # Kombu gives back what is not acknowledged in time, whoever took it. A monitor may not touch the workers'
            # deliveries, so it looks after tables of its own, which stay empty.
            "unacked_key": "celeryev.unacked",
            "unacked_index_key": "celeryev.unacked_index",
            "unacked_mutex_key": "celeryev.unacked_mutex",
            "socket_timeout": BROKER_TIMEOUT_S,
            "socket_connect_timeout": BROKER_TIMEOUT_S,
            "socket_keepalive": True,
            "health_check_interval": 15,
        },
    )
    return monitor


app = make_monitor(
    with_password(secret_from(os.environ, URL_VARIABLE) or DEFAULT_REDIS_URL, os.environ),
    os.environ.get("LAMELLA_PREFIX", DEFAULT_PREFIX),
)
