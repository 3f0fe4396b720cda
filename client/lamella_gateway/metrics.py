"""Counters of the gateway itself, for Prometheus: requests, their time, open streams.

Owns the registry and its names. No label holds a user, a key or a model name that a caller made up.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class GatewayMetrics:
    """The metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "lamella_gateway_requests", "Requests answered.", ["endpoint", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "lamella_gateway_request_seconds",
            "Time from a request to the end of its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.open_streams = Gauge(
            "lamella_gateway_open_streams", "Requests that wait for tokens now.", registry=self.registry
        )
        self.disconnects = Counter(
            "lamella_gateway_disconnects", "Clients that left before the end.", registry=self.registry
        )

    def exposition(self, request: Request) -> Response:
        """Return all of it in the form the scraper asks for."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.registry), media_type=content_type)
