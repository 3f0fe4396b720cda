"""The HTTP server of metrics: ports, paths, and requests that go wrong."""

from __future__ import annotations

import json
import socket
import urllib.error
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from lamella_worker import metrics_server
from lamella_worker.metrics_server import AT_ONCE, MetricsServer, PortTaken
from tests.scrape import fetch, scrape


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("lamella_things", "Things.", registry=registry).inc(3)
    return registry


@pytest.fixture
def server(registry: CollectorRegistry) -> Iterator[MetricsServer]:
    server = MetricsServer("127.0.0.1", 0, registry)
    yield server
    server.close()


def test_any_free_port_is_taken_and_told(server: MetricsServer) -> None:
    assert server.address == f"127.0.0.1:{server.port}"
    assert server.port > 0
    assert scrape(server.address).value("lamella_things_total") == 3
    assert "_created" not in fetch(f"http://{server.address}/metrics?name=x")


def test_two_of_one_host_take_neighbouring_ports(server: MetricsServer, registry: CollectorRegistry) -> None:
    second = MetricsServer("127.0.0.1", server.port, registry)

    assert second.port > server.port
    assert scrape(second.address).value("lamella_things_total") == 3
    second.close()


def test_no_free_port_is_an_error_that_names_them(
    server: MetricsServer, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "PORTS_TRIED", 1)

    with pytest.raises(PortTaken, match=f"ports {server.port} to {server.port} are all taken"):
        MetricsServer("127.0.0.1", server.port, registry)


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host"])
def test_an_address_that_is_not_this_hosts_is_an_error(registry: CollectorRegistry, host: str) -> None:
    with pytest.raises(PortTaken, match="metrics cannot be served on"):
        MetricsServer(host, 0, registry)


def test_other_paths_are_not_found(server: MetricsServer) -> None:
    for path in ("/", "/targets", "/metrics/../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch(f"http://{server.address}{path}")
        assert caught.value.code == 404
        caught.value.close()


def test_targets_are_told_where_there_are_any(registry: CollectorRegistry) -> None:
    server = MetricsServer("127.0.0.1", 0, registry, lambda: [{"targets": ["a:1"], "labels": {}}])

    found = json.loads(fetch(f"http://{server.address}/targets"))
    server.close()

    assert found == [{"targets": ["a:1"], "labels": {}}]


def test_requests_that_never_end_do_not_pile_up(server: MetricsServer) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(AT_ONCE)]
    for connection in silent:
        connection.sendall(b"GET /metrics HTT")

    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as one_more:
        turned_away = one_more.recv(100)

    assert turned_away == b""
    for connection in silent:
        connection.close()


def test_a_collector_that_fails_is_an_error_of_the_scrape_alone(
    server: MetricsServer, registry: CollectorRegistry
) -> None:
    class Failing:
        is_broken = False

        def collect(self):  # type: ignore[no-untyped-def]
            if self.is_broken:
                raise ValueError("no figures")
            return iter(())

    failing = Failing()
    registry.register(failing)  # type: ignore[arg-type]
    failing.is_broken = True

    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(f"http://{server.address}/metrics")
    failing.is_broken = False

    assert caught.value.code == 500
    caught.value.close()
    assert scrape(server.address).value("lamella_things_total") == 3


def test_closing_again_is_harmless(registry: CollectorRegistry) -> None:
    server = MetricsServer("127.0.0.1", 0, registry)
    server.close()
    server.close()

    with pytest.raises(urllib.error.URLError):
        fetch(f"http://{server.address}/metrics")
