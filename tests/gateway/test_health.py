"""Health, metrics, CORS: what surrounds the API."""

from __future__ import annotations

import http.client
import json

import pytest

from lamella.embedded import EmbeddedServer
from lamella.errors import ConfigError
from lamella_gateway.settings import Settings
from tests.client.acting_worker import MODEL, ActingWorker
from tests.gateway.running_gateway import AnsweringWorker, RunningGateway
from tests.scrape import Scrape
from tests.waiting import wait_until


def get(gateway: RunningGateway, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=40)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    found = response.status, response.read().decode(), {k.lower(): v for k, v in response.getheaders()}
    connection.close()
    return found


def test_it_is_ready_when_a_worker_is_alive(guarded: RunningGateway, embedded_redis: object) -> None:
    before = get(guarded, "/health/ready")
    worker = ActingWorker(embedded_redis)  # type: ignore[arg-type]  # the fixture is a client
    worker.announce(draining=True)
    draining = get(guarded, "/health/ready")
    worker.announce()
    after = get(guarded, "/health/ready")

    assert (before[0], draining[0], after[0]) == (503, 503, 200)
    assert json.loads(before[1]) == {"status": "unavailable", "queue": True, "workers": 0}
    assert json.loads(after[1]) == {"status": "ok", "queue": True, "workers": 1}


def test_it_lives_but_is_not_ready_without_the_queues_server(own_server: EmbeddedServer) -> None:
    with RunningGateway(own_server.url) as gateway:
        own_server.stop()

        assert get(gateway, "/health/live")[0] == 200
        status, body, _ = get(gateway, "/health/ready")

    assert status == 503
    assert json.loads(body)["queue"] is False


def test_metrics_count_requests_and_open_streams(gateway: RunningGateway, answering: AnsweringWorker) -> None:
    with gateway.client() as sdk:
        list(sdk.completions.create(model=MODEL, prompt="Hi", stream=True))
        sdk.models.list()

    def counted() -> Scrape | None:
        scrape = Scrape(get(gateway, "/metrics")[1])
        return scrape if scrape.has("lamella_gateway_requests_total", endpoint="/v1/completions") else None

    scrape = wait_until(counted)
    assert scrape.value("lamella_gateway_requests_total", endpoint="/v1/completions", method="POST", status="200") == 1
    assert scrape.value("lamella_gateway_requests_total", endpoint="/v1/models") == 1
    assert scrape.value("lamella_gateway_request_seconds_count", endpoint="/v1/completions") == 1
    assert scrape.value("lamella_gateway_open_streams") == 0


def test_pages_of_named_origins_may_call(embedded_server: EmbeddedServer) -> None:
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    with RunningGateway(embedded_server.url, requires_key=True, cors_origins=("https://a.example",)) as gateway:
        named = get(gateway, "/v1/chat/completions", "OPTIONS", Origin="https://a.example", **asked)
        other = get(gateway, "/v1/chat/completions", "OPTIONS", Origin="https://b.example", **asked)
        answer = get(gateway, "/v1/models", Origin="https://a.example")

    assert named[0] == 200
    assert named[2]["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in other[2]
    assert answer[0] == 401, "and they learn why"
    assert answer[2]["access-control-allow-origin"] == "https://a.example"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "0.0.0.0", "requires_key": False}, "--no-auth"),
        ({"host": "example.org", "requires_key": False}, "--no-auth"),
        ({"cors_origins": ("*",), "requires_key": False}, "--cors-origin"),
        ({"cors_origins": ("example.org",)}, "--cors-origin"),
        ({"max_request_s": 0.0}, "--max-request-s"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**settings)  # type: ignore[arg-type]  # the mistake under test
