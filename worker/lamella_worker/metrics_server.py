"""A small HTTP server for metrics: on loopback unless told otherwise, on a port that no other worker has.

Owns the socket and its threads, how many requests are answered at once and how long one may take. What is told comes
from a registry of prometheus_client. It asks for no password, so nothing secret may be among the metrics.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.exposition import choose_encoder

log = logging.getLogger(__name__)

PORTS_TRIED = 64
REQUEST_S = 10.0
AT_ONCE = 8
_LOOK_S = 0.2
_JOIN_S = 5.0

Targets = Callable[[], list[dict[str, object]]]


class PortTaken(Exception):
    """No port of those that may be used is free, or the address is not this host's."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, targets: Targets | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.registry = registry
        self.targets = targets
        self.room = threading.BoundedSemaphore(AT_ONCE)
        super().__init__(address, _Handler)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Answer in a thread of its own, or not at all where too many are being answered."""
        if not self.room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.room.release()
            raise

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        """Give the place back when the request is done."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that goes away is no event; the rest is worth a line."""
        log.debug("a request for metrics failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_S

    def do_GET(self) -> None:
        """Metrics, the list of targets where there is one, or 404."""
        server = cast(_Server, self.server)
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            try:
                body = encode(server.registry)
            except Exception as error:
                log.exception("the metrics cannot be told")
                self._answer(500, "text/plain", f"{type(error).__name__}\n".encode())
                return
            self._answer(200, content_type, body)
        elif path == "/targets" and server.targets is not None:
            self._answer(200, "application/json", json.dumps(server.targets()).encode())
        else:
            self._answer(404, "text/plain", b"metrics are at /metrics\n")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each scrape."""

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class MetricsServer:
    """Serves `registry` from when it is made until it is closed.

    Args:
        host: the address to listen on.
        port: the port, or where it is taken one of the next PORTS_TRIED; 0 for any.
        registry: what is served under ``/metrics``.
        targets: what is served under ``/targets``; None for nothing.

    Raises:
        PortTaken: there is no port to be had.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, targets: Targets | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations. They would double the series, and nobody asks when a counter began
        self._server = _bind(host, port, registry, targets)
        self.port = int(self._server.server_address[1])
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
        self.address = f"[{shown}]:{self.port}" if ":" in shown else f"{shown}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_LOOK_S,), name="metrics", daemon=True)
        self._thread.start()
        self._is_closed = False

    def close(self) -> None:
        """Stop serving; idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_JOIN_S)


def _bind(host: str, port: int, registry: CollectorRegistry, targets: Targets | None) -> _Server:
    last = port if port == 0 else min(65535, port + PORTS_TRIED - 1)
    for candidate in range(port, last + 1):
        try:
            return _Server((host, candidate), registry, targets)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise PortTaken(f"metrics cannot be served on {host}:{candidate}: {error.strerror or error}") from error
    raise PortTaken(f"metrics cannot be served on {host}: ports {port} to {last} are all taken")
