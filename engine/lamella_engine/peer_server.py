"""Shares the complete models of a store with other hosts over HTTP; reads, never writes.

Owns the socket, the paths, who may ask, and how many are answered at once. Only files that a published manifest lists
are sent, so no path leads elsewhere; what a file holds is proved by the hash in the manifest, which the other side
checks. Neighbours: `peer_client` asks, `shard_store` lists. Paths, below ``/lamella/1``::

    /models                              names, builds and sizes
    /models/{model}/manifest             a model's manifest; {model} is its directory's name in the store
    /models/{model}/{build}/{file}       one of its files, whole or from an offset on (``Range: bytes=N-``)
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import logging
import os
import re
import socket
import stat
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, cast
from urllib.parse import unquote

from lamella_engine import names
from lamella_engine.errors import ModelError, OptionError
from lamella_engine.manifest import Manifest, as_json
from lamella_engine.shard_store import ShardStore

logger = logging.getLogger(__name__)

ROOT = "/lamella/1"
AT_ONCE = 32
SILENCE_S = 30.0
_JOIN_S = 5.0
_LOOK_S = 0.2
_BUSY = b"HTTP/1.1 503 Busy\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_RANGE = re.compile(r"bytes=(\d{1,18})-", re.ASCII)


class Refused(Exception):
    """The request is answered with a status and a sentence instead of a file."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        self.status = status
        super().__init__(message)


class PeerServer:
    """A store's door for other hosts; listens from `start` until `close`.

    Args:
        store: whose models are shared.
        host, port: where to listen; port 0 takes a free one.
        token: what a request must bring as ``Authorization: Bearer``; None asks for nothing.
        at_once: connections that are served at the same time; another one is turned away with 503.
        silence_s: seconds after which a connection that neither asks nor takes is closed.

    Raises:
        OptionError: nobody can listen there.
    """

    def __init__(
        self,
        store: ShardStore,
        host: str,
        port: int,
        *,
        token: str | None = None,
        at_once: int = AT_ONCE,
        silence_s: float = SILENCE_S,
    ) -> None:
        try:
            self._server = _Server((host, port), _Shelf(store), token, at_once, silence_s)
        except (OSError, OverflowError) as error:
            raise OptionError(f"cannot listen on {host}:{port}: {error}; give another address or port") from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_LOOK_S,), name="peer-server")
        self._thread.daemon = True

    @property
    def address(self) -> str:
        """Where it listens, as peers are told: ``http://host:port``."""
        host, port = self._server.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def start(self) -> None:
        """Start answering."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and cut what is being sent; idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(_JOIN_S)
        self._server.server_close()
        self._server.cut_all()


class _Shelf:
    """What may be asked for: manifests of complete models, and the files they list."""

    def __init__(self, store: ShardStore) -> None:
        self._store = store

    def listing(self) -> bytes:
        entries = [
            {"name": each.name, "build": each.build, "dtype": each.dtype, "size_bytes": each.size_bytes}
            for each in self._store.list()
        ]
        return json.dumps({"models": entries}).encode()

    def manifest(self, directory: str) -> Manifest:
        name = directory.replace("+", "/")
        if not names.is_model_name(name) or names.directory_name(name) != directory:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{directory[:200]!r} is not the directory of a model")
        try:
            return self._store.manifest(name)
        except ModelError as error:
            raise Refused(HTTPStatus.NOT_FOUND, f"{name} is not complete here") from error

    @contextlib.contextmanager
    def file(self, directory: str, build: str, file: str) -> Iterator[tuple[IO[bytes], int]]:
        """One file of a model, opened, and its size."""
        manifest = self.manifest(directory)
        record = next((each for each in manifest.files if each.file == file), None)
        if manifest.build != build or record is None:
            raise Refused(HTTPStatus.NOT_FOUND, f"{manifest.name} has no such file now; read its manifest again")
        path = self._store.build_directory(manifest) / record.file
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            why = "lies outside the store" if error.errno == errno.ELOOP else "cannot be read"
            raise Refused(HTTPStatus.CONFLICT, f"{record.file} of {manifest.name} {why}") from error
        with os.fdopen(descriptor, "rb", buffering=0) as opened:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size != record.nbytes:
                raise Refused(HTTPStatus.CONFLICT, f"{record.file} of {manifest.name} is damaged here")
            yield opened, record.nbytes


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(
        self, address: tuple[str, int], shelf: _Shelf, token: str | None, at_once: int, silence_s: float
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.shelf, self.token, self.silence_s = shelf, token, silence_s
        self._room = threading.BoundedSemaphore(at_once)
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        super().__init__(address, _Handler)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Answer in a thread of its own, or say at once that too many are being answered."""
        connection = cast(socket.socket, request)
        if not self._room.acquire(blocking=False):
            connection.settimeout(1.0)
            with contextlib.suppress(OSError):
                connection.sendall(
                    b"HTTP/1.1 503 Busy\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            self.shutdown_request(connection)
            return
        with self._guard:
            self._open.add(connection)
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._forget(connection)
            raise

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        """Give the place back when the connection ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(cast(socket.socket, request))

    def _forget(self, connection: socket.socket) -> None:
        with self._guard:
            self._open.discard(connection)
        self._room.release()

    def cut_all(self) -> None:
        """End every connection."""
        with self._guard:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A peer that goes away or takes nothing is no fault of ours."""
        logger.debug("a request of a peer failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        """Bound how long the connection may be silent."""
        super().setup()
        self.connection.settimeout(cast(_Server, self.server).silence_s)

    def do_GET(self) -> None:
        """Send what the path names, or a sentence that says why not."""
        server = cast(_Server, self.server)
        try:
            self._check_token(server.token)
            self._answer(server.shelf)
        except Refused as refusal:
            text = f"{refusal}\n".encode("utf-8", "replace")
            extra = {"WWW-Authenticate": "Bearer"} if refusal.status is HTTPStatus.UNAUTHORIZED else {}
            self._head(refusal.status, len(text), "text/plain; charset=utf-8", extra)
            self.wfile.write(text)

    def _check_token(self, token: str | None) -> None:
        if token is None:
            return
        given = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Refused(HTTPStatus.UNAUTHORIZED, "this peer asks for its token")

    def _answer(self, shelf: _Shelf) -> None:
        path = self.path.partition("?")[0]
        match [unquote(part, errors="replace") for part in path.removeprefix(ROOT).split("/")[1:]]:
            case _ if not path.startswith(f"{ROOT}/"):
                raise Refused(HTTPStatus.NOT_FOUND, f"models are shared below {ROOT}/models")
            case ["models"]:
                self._send_json(shelf.listing())
            case ["models", model, "manifest"]:
                self._send_json(as_json(shelf.manifest(model)))
            case ["models", model, build, file]:
                with shelf.file(model, build, file) as (opened, nbytes):
                    self._send_file(opened, nbytes)
            case _:
                raise Refused(HTTPStatus.NOT_FOUND, "there is nothing of that path")

    def _send_json(self, body: bytes) -> None:
        self._head(HTTPStatus.OK, len(body), "application/json", {})
        self.wfile.write(body)

    def _send_file(self, opened: IO[bytes], nbytes: int) -> None:
        wanted = self.headers.get("Range")
        match = _RANGE.fullmatch(wanted) if wanted is not None else None
        offset = int(match[1]) if match else 0
        if wanted is not None and (match is None or offset >= max(nbytes, 1)):
            raise Refused(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"the file has {nbytes} bytes; use bytes=N-")
        status = HTTPStatus.PARTIAL_CONTENT if match else HTTPStatus.OK
        extra = {"Content-Range": f"bytes {offset}-{nbytes - 1}/{nbytes}"} if match else {}
        self._head(status, nbytes - offset, "application/octet-stream", extra)
        if nbytes > offset:
            self.connection.sendfile(opened, offset, nbytes - offset)

    def _head(self, status: HTTPStatus, nbytes: int, content_type: str, extra: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(nbytes))
        for key, value in extra.items():
            self.send_header(key, value)
        self.end_headers()

    def version_string(self) -> str:
        """Say no more than what this is."""
        return "lamella"

    def log_message(self, format: str, *args: object) -> None:
        """Tell of requests in our own log; the address is enough to find the peer."""
        logger.info("peer %s: %s", self.client_address[0], (format % args).encode("ascii", "backslashreplace").decode())
