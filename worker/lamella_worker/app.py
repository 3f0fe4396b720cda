"""The Celery app of a worker: its settings, and its broker address in Celery's own words.

Owns every Celery setting, because each of them was chosen against a fault: messages are acknowledged after the work,
redelivered within seconds, carry an id only, and never leave a result. Knows nothing of engines; `tasks` adds the one
task, `lease` and `subscriptions` are its consumer's timers.
"""

from __future__ import annotations

import ssl
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from celery import Celery

from lamella.keys import queue_name
from lamella.server_url import TLS_FILES
from lamella_worker import transport
from lamella_worker.config import WorkerConfig
from lamella_worker.flower_info import FlowerInfo
from lamella_worker.lease import DeliveryLease
from lamella_worker.model_slots import ModelSlots, celery_concurrency
from lamella_worker.remote_control import LookOnlyNode
from lamella_worker.subscriptions import Subscriptions, SubscriptionStep, make_queue

VISIBILITY_TIMEOUT_S = 60  # renewed each third of it by `lease`; a dead worker's deliveries come back after it
BROKER_TIMEOUT_S = 5  # the consumer waits for several such answers in turn before it knows that a connection is dead


def make_app(config: WorkerConfig, subscriptions: Subscriptions, slots: ModelSlots) -> Celery:
    """Return the Celery app of one worker, consuming the queues of the models that it starts with."""
    app = Celery("lamella", set_as_current=False)
    queues = [queue_name(model) for model in config.worker.served]
    url = config.redis.url.get_secret_value()
    app.conf.update(
        broker_url=broker_url(url, transport.NAME),
        broker_transport=transport.NAME,
        broker_use_ssl=broker_ssl(url),
        result_backend=None,
        result_backend_thread_safe=True,  # there is none, and making one for each thread reads every installed package
        task_acks_late=True,
        task_ignore_result=True,
        task_reject_on_worker_lost=True,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[make_queue(queue) for queue in queues],
        task_default_queue=queues[0],
        worker_pool="threads",
        worker_concurrency=celery_concurrency(config.slots, len(queues)),
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
            transport.FULL_QUEUES: slots.full,
        },
    )
    _ = app.backend  # made here, once: else all threads make it when their first tasks end, and tokens wait for that
    app.lamella_subscriptions = subscriptions
    app.control.mailbox.node_cls = LookOnlyNode
    app.steps["consumer"].update({DeliveryLease, FlowerInfo, SubscriptionStep})
    return app


def broker_url(url: str, transport_name: str = "redis") -> str:
    """Return a Redis URL as Celery reads it: a unix socket is ``redis+socket://``, its database ``virtual_host``.

    Credentials go to the front, where Celery blots them out; options for TLS are left to `broker_ssl`.
    """
    parts = urlsplit(url)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    credentials, _, place = parts.netloc.rpartition("@")
    if not credentials and ("username" in query or "password" in query):
        credentials = f"{quote(query.get('username', ''), safe='')}:{quote(query.get('password', ''), safe='')}"
    login = f"{credentials}@" if credentials else ""
    if parts.scheme == "unix":
        return f"{transport_name}+socket://{login}{parts.path}?{urlencode({'virtual_host': query.get('db', '0')})}"
    return f"{parts.scheme}://{login}{place}/{query.get('db') or parts.path.strip('/')}".rstrip("/")


def broker_ssl(url: str) -> dict[str, object] | None:
    """Return Celery's TLS settings for a rediss:// URL: certificate and host name are checked unless it says not to.

    Celery by itself checks no certificate.
    """
    parts = urlsplit(url)
    if parts.scheme != "rediss":
        return None
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    kinds = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
    kind = query.get("ssl_cert_reqs", "required")
    checks_name = query.get("ssl_check_hostname", "true").lower() == "true" and kind != "none"
    files = {key: value for key, value in query.items() if key in TLS_FILES}
    return {"ssl_cert_reqs": kinds[kind], "ssl_check_hostname": checks_name, **files}
