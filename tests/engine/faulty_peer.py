"""A peer that passes on what a real one says, and fails where a test wants it to."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import urlsplit

Fault = Callable[["_Handler", http.client.HTTPResponse, bytes], None]


@dataclass
class FaultyPeer:
    """What goes wrong, set by the test, and what was asked.

    Attributes:
        behind: address of the real peer.
        faults: by the last part of the path, what happens to the next requests for it, in order; then all is well.
        asked: (last part of the path, Range header) of each request, in order.
        stopped: set when the peer ends; faults that wait look at it.
    """

    behind: str
    address: str = ""
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def ranges_of(self, file: str) -> list[str | None]:
        return [span for asked, span in self.asked if asked == file]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, peer: FaultyPeer) -> None:
        self.peer = peer
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def peer(self) -> FaultyPeer:
        return cast(_Server, self.server).peer

    def do_GET(self) -> None:
        file = self.path.rpartition("/")[2]
        self.peer.asked.append((file, self.headers.get("Range")))
        behind = urlsplit(self.peer.behind)
        with contextlib.closing(http.client.HTTPConnection(str(behind.hostname), behind.port, timeout=40)) as real:
            real.request("GET", self.path, headers=dict(self.headers.items()))
            answer = real.getresponse()
            body = answer.read()
        waiting = self.peer.faults.get(file, [])
        (waiting.pop(0) if waiting else as_it_is)(self, answer, body)

    def send_head(self, answer: http.client.HTTPResponse, nbytes: int) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Length", str(nbytes))
        if span := answer.getheader("Content-Range"):
            self.send_header("Content-Range", span)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def as_it_is(handler: _Handler, answer: http.client.HTTPResponse, body: bytes) -> None:
    handler.send_head(answer, len(body))
    handler.wfile.write(body)


def cut_after(nbytes: int) -> Fault:
    """Promise the whole body, and break off."""

    def fault(handler: _Handler, answer: http.client.HTTPResponse, body: bytes) -> None:
        handler.send_head(answer, len(body))
        handler.wfile.write(body[:nbytes])
        handler.close_connection = True

    return fault


def flipped(handler: _Handler, answer: http.client.HTTPResponse, body: bytes) -> None:
    """One wrong bit in the middle."""
    middle = len(body) // 2
    as_it_is(handler, answer, body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])


def shorter(handler: _Handler, answer: http.client.HTTPResponse, body: bytes) -> None:
    """A body that is consistently too short."""
    as_it_is(handler, answer, body[:-1])


def silent(handler: _Handler, answer: http.client.HTTPResponse, body: bytes) -> None:
    """No answer at all."""
    handler.peer.stopped.wait(40)
    handler.close_connection = True


def hanging(handler: _Handler, answer: http.client.HTTPResponse, body: bytes) -> None:
    """Half of the body, and then nothing."""
    handler.send_head(answer, len(body))
    handler.wfile.write(body[: len(body) // 2])
    handler.peer.stopped.wait(40)
    handler.close_connection = True


def dripping(handler: _Handler, answer: http.client.HTTPResponse, body: bytes) -> None:
    """A byte now and then, for ever."""
    handler.send_head(answer, len(body))
    for at in range(len(body)):
        with contextlib.suppress(OSError):
            handler.wfile.write(body[at : at + 1])
        if handler.peer.stopped.wait(0.02):
            break
    handler.close_connection = True


def instead(replace: Callable[[bytes], bytes]) -> Fault:
    """Another body."""
    return lambda handler, answer, body: as_it_is(handler, answer, replace(body))


def refusing(status: int) -> Fault:
    def fault(handler: _Handler, answer: http.client.HTTPResponse, body: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fault


@contextlib.contextmanager
def faulty_peer(behind: str) -> Iterator[FaultyPeer]:
    """Run a peer in front of the one at `behind`."""
    peer = FaultyPeer(behind)
    server = _Server(peer)
    peer.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="faulty-peer")
    thread.start()
    try:
        yield peer
    finally:
        peer.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join(40)
