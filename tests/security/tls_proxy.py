"""A TLS port in front of a server's unix socket, since the embedded server is built without TLS."""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

LOOK_S = 0.2
CHUNK = 65_536


class TlsProxy:
    """Accepts TLS, or plain TCP without a certificate, and passes on what it carries.

    With `client_authority` it asks for a client certificate.
    """

    def __init__(
        self, target: Path, certificate: tuple[Path, Path] | None, client_authority: Path | None = None
    ) -> None:
        self._target = target
        self._context = None if certificate is None else ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self._context is not None and certificate is not None:
            self._context.load_cert_chain(*certificate)
        if self._context is not None and client_authority is not None:
            self._context.load_verify_locations(client_authority)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(LOOK_S)
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def __enter__(self) -> TlsProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(40.0)
        self._listener.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="tls-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(40.0)
        with connection, contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            outer = connection
            if self._context is not None:
                outer = stack.enter_context(self._context.wrap_socket(connection, server_side=True))
            inner = stack.enter_context(socket.socket(socket.AF_UNIX))
            inner.connect(str(self._target))
            self._pass_on(outer, inner)

    def _pass_on(self, outer: socket.socket, inner: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(outer, selectors.EVENT_READ, inner)
            selector.register(inner, selectors.EVENT_READ, outer)
            while not self._closed.is_set():
                for key, _ in selector.select(LOOK_S):
                    source, sink = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    data = source.recv(CHUNK)
                    while isinstance(source, ssl.SSLSocket) and source.pending():
                        data += source.recv(CHUNK)
                    if not data:
                        return
                    sink.sendall(data)
