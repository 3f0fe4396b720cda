"""The Celery app of a worker: its settings, and its broker address in Celery's own words.

Owns every Celery setting, because each of them was chosen against a fault: messages are acknowledged after the work,
redelivered within seconds, carry an id only, and never leave a result. Knows nothing of engines; `tasks` adds the one
task, `lease` and `reconciler` are its consumer's timers.
"""

from __future__ import annotations

import ssl
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from celery import Celery
from kombu.entity import Queue

from lamella.keys import queue_name
from lamella_worker import transport
from lamella_worker.config import WorkerConfig
from lamella_worker.flower_info import FlowerInfo
from lamella_worker.lease import DeliveryLease
from lamella_worker.reconciler import Reconciler, ReconcilerStep

VISIBILITY_TIMEOUT_S = 60  # renewed each third of it by `lease`; a dead worker's deliveries come back after it
BROKER_TIMEOUT_S = 30


def make_app(config: WorkerConfig, reconciler: Reconciler) -> Celery:
    """Return the Celery app of one worker, consuming its model's queue only."""
    app = Celery("lamella", set_as_current=False)
    queue = queue_name(config.worker.model)
    app.conf.update(
        broker_url=broker_url(config.redis.url, transport.NAME),
        broker_transport=transport.NAME,
        broker_use_ssl=broker_ssl(config.redis.url),
        result_backend=None,
        task_acks_late=True,
        task_ignore_result=True,
        task_reject_on_worker_lost=True,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[Queue(queue, routing_key=queue)],  # type: ignore[no-untyped-call]  # kombu has few types
        task_default_queue=queue,
        worker_pool="threads",
        worker_concurrency=config.slots,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 15,
            "global_keyprefix": config.redis.prefix,
            "socket_timeout": BROKER_TIMEOUT_S,
            "socket_connect_timeout": BROKER_TIMEOUT_S,
            "socket_keepalive": True,
            "health_check_interval": 15,
        },
    )
    app.lamella_reconciler = reconciler
    app.steps["consumer"].update({DeliveryLease, FlowerInfo, ReconcilerStep})
    return app


def broker_url(url: str, transport_name: str = "redis") -> str:
    """Return a Redis URL as Celery reads it: a unix socket is ``redis+socket://``, its database ``virtual_host``."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    credentials = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    if not credentials and ("username" in query or "password" in query):
        credentials = f"{quote(query.get('username', ''), safe='')}:{quote(query.get('password', ''), safe='')}@"
    return f"{transport_name}+socket://{credentials}{parts.path}?{urlencode({'virtual_host': query.get('db', '0')})}"


def broker_ssl(url: str) -> dict[str, ssl.VerifyMode] | None:
    """Celery checks no certificate unless told to; the worker's own connections do, so the broker's do as well."""
    parts = urlsplit(url)
    if parts.scheme != "rediss" or "ssl_cert_reqs" in parse_qs(parts.query):
        return None
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED}
