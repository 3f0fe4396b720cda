"""Celery's settings and the broker's address in Celery's words."""

from __future__ import annotations

import ssl
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery.app import backends
from kombu import Connection
from kombu.transport.redis import Channel

from lamella.embedded import EmbeddedServer
from lamella_worker.app import VISIBILITY_TIMEOUT_S, broker_url, make_app
from lamella_worker.config import load_config
from lamella_worker.model_slots import ModelSlots
from lamella_worker.subscriptions import Subscriptions
from lamella_worker.transport import NAME, Transport


def app_for(url: str, prefix: str = "p:"):  # type: ignore[no-untyped-def]  # celery has no types
    flags: dict[str, object] = {"worker.model": "owner/name", "redis.url": url, "redis.prefix": prefix}
    config = load_config(None, {**flags, "engine.max_sequences": 5}, environ={})
    served = Subscriptions(lambda: config.worker.served, config.slots)
    return make_app(config, served, ModelSlots(config.slots))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://host:6380/2", "redis://host:6380/2"),
        ("rediss://u:p@host/0", "rediss://u:p@host/0"),
        ("unix:///run/x.sock", "redis+socket:///run/x.sock?virtual_host=0"),
        ("unix:///run/x.sock?db=3", "redis+socket:///run/x.sock?virtual_host=3"),
        ("unix://:pw@/run/x.sock?db=3", "redis+socket://:pw@/run/x.sock?virtual_host=3"),
        ("unix:///run/x.sock?db=3&password=p%2Fw", "redis+socket://:p%2Fw@/run/x.sock?virtual_host=3"),
        ("unix:///run/a%20b.sock?db=0", "redis+socket:///run/a%20b.sock?virtual_host=0"),
    ],
)
def test_a_redis_url_becomes_celerys(url: str, expected: str) -> None:
    assert broker_url(url) == expected


def test_kombu_reads_the_socket_the_database_and_the_password_back() -> None:
    connection = Connection(broker_url("unix://:p%2Fw@/run/a%20b.sock?db=3", NAME))
    channel = Channel.__new__(Channel)  # its parameters, without connecting
    channel.connection = connection.transport

    params = channel._connparams()

    assert (params["path"], params["db"], params["password"]) == ("/run/a b.sock", 3, "p/w")
    assert "p/w" not in connection.as_uri()
    assert isinstance(connection.transport, Transport)


def test_a_worker_consumes_its_models_queue_only_and_one_job_a_slot() -> None:
    app = app_for("redis://host/0")

    assert list(app.amqp.queues) == ["generate.owner/name"]
    assert app.conf.worker_concurrency == 5
    assert app.conf.worker_prefetch_multiplier == 1


def test_deliveries_are_acknowledged_late_and_come_back_soon() -> None:
    app = app_for("redis://host/0", prefix="p:")

    options = app.conf.broker_transport_options

    assert app.conf.task_acks_late
    assert app.conf.task_reject_on_worker_lost
    assert app.conf.result_backend is None
    assert app.conf.accept_content == ["json"]
    assert app.conf.broker_connection_max_retries is None
    assert not app.conf.worker_cancel_long_running_tasks_on_connection_loss
    assert options["visibility_timeout"] == VISIBILITY_TIMEOUT_S
    assert options["global_keyprefix"] == "p:"
    assert (options["unacked_restore_interval"], options["unacked_restore_throttle"]) == (5, 1)
    assert options["unacked_mutex_expire"] == 15


def test_all_threads_of_a_worker_share_what_keeps_no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_for("redis://host/0")
    made: list[object] = []
    monkeypatch.setattr(backends, "by_url", lambda *arguments: made.append(arguments))

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: id(app.backend), range(16)))

    assert found == {id(app.backend)}
    assert not made, "each reads the files of every installed package"


def test_commands_of_a_channel_share_a_client_as_long_as_its_connections(embedded_server: EmbeddedServer) -> None:
    with app_for(embedded_server.url).connection_for_read() as connection:
        channel = connection.default_channel
        with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
            assert first is second
            assert first.ping()
        with channel.conn_or_acquire(first) as given:
            assert given is first

        channel._disconnect_pools()

        with channel.conn_or_acquire() as later:
            assert later is not first
            assert later.ping()
            assert later.connection_pool is channel.pool


def test_tls_checks_the_certificate_unless_told_otherwise() -> None:
    strict = app_for("rediss://host/0")
    loose = app_for("rediss://host/0?ssl_cert_reqs=none")

    assert isinstance(strict.connection_for_read().transport, Transport)
    assert strict.connection_for_read().ssl == {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
    assert loose.connection_for_read().ssl == {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}
