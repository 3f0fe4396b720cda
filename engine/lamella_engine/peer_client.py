"""Asks one peer for manifests and files over HTTP, patiently but not for ever.

Owns the connection and its deadlines, and turns whatever goes wrong there into a `PeerError`. Knows nothing of stores:
`peer_fetch` decides what to ask for and what to do with it. Follows no redirect and asks no proxy, so the token goes to
the peer alone.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from urllib.parse import quote

from lamella_engine import names
from lamella_engine.errors import PeerCut, PeerError, PeerLacksModel
from lamella_engine.peer_address import USUAL, Patience, PeerAddress

ROOT = "/lamella/1"
MAX_MANIFEST_BYTES = 64 << 20
PIECE_BYTES = 1 << 20
_MAX_REASON_BYTES = 500


class PeerClient:
    """One connection to a peer, kept from request to request; closed by whoever made it."""

    def __init__(self, peer: PeerAddress, token: str | None = None, patience: Patience = USUAL) -> None:
        self.peer = peer
        self._token = token
        self._patience = patience
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        """Close the connection; idempotent, and a later request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def manifest(self, name: str) -> bytes:
        """The manifest of the model `name`, as the peer has it.

        Raises:
            PeerLacksModel: it has none.
            PeerError: it gives none; PeerCut where asking again may help.
        """
        path = f"{ROOT}/models/{quote(names.directory_name(name), safe='')}/manifest"
        with self._answer(path, {}) as answer:
            if answer.status == HTTPStatus.NOT_FOUND:
                raise PeerLacksModel(f"{self.peer} does not have {name}")
            self._check_status(answer)
            body = bytearray()
            for piece in self._pieces(answer):
                body += piece
                if len(body) > MAX_MANIFEST_BYTES:
                    raise PeerError(f"{self.peer} sends a manifest of {name} of over {MAX_MANIFEST_BYTES} bytes")
        return bytes(body)

    @contextlib.contextmanager
    def file(self, name: str, build: str, file: str, offset: int, nbytes: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """A file of `nbytes` bytes from `offset` on: where it begins (0 if the peer cannot skip), and its pieces.

        Raises:
            PeerError: the peer gives another amount, or nothing; PeerCut, also from the pieces, where asking again from
                where it ended may help.
        """
        path = f"{ROOT}/models/{quote(names.directory_name(name), safe='')}/{quote(build)}/{quote(file)}"
        with self._answer(path, {"Range": f"bytes={offset}-"} if offset else {}) as answer:
            self._check_status(answer)
            begin = offset if answer.status == HTTPStatus.PARTIAL_CONTENT else 0
            span = f"bytes {begin}-{nbytes - 1}/{nbytes}"
            if begin and answer.getheader("Content-Range") != span:
                raise PeerError(f"{self.peer} sends another part of {file} than was asked for")
            if answer.length != nbytes - begin:
                raise PeerError(
                    f"{self.peer} offers {answer.length} bytes of {file} where its manifest leaves {nbytes - begin}"
                )
            yield begin, self._pieces(answer)

    @contextlib.contextmanager
    def _answer(self, path: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
        """Ask; the connection is kept if the answer was read to its end."""
        if self._token is not None:
            headers = {**headers, "Authorization": f"Bearer {self._token}"}
        try:
            with self._said():
                answer = self._ask(path, headers)
            yield answer
            if not answer.isclosed() or answer.will_close:
                self.close()
        except BaseException:
            self.close()
            raise

    def _ask(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        is_kept = self._connection is not None
        try:
            return self._ask_once(path, headers)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            if not is_kept:
                raise
            self.close()  # the peer let go of the connection in between
            return self._ask_once(path, headers)

    def _ask_once(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        connection = self._connection or self._connect()
        # A timeout of the socket starts anew with each byte; this one ends an answer that drips.
        late = threading.Timer(self._patience.answer_s, _cut, (connection.sock,))
        late.name, late.daemon = "peer-answer", True
        late.start()
        try:
            connection.request("GET", path, headers=headers)
            return connection.getresponse()
        except (http.client.HTTPException, OSError):
            if not late.is_alive():
                raise TimeoutError(f"no answer within {self._patience.answer_s:g} s") from None
            raise
        finally:
            late.cancel()

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.peer.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.peer.host, self.peer.port, timeout=self._patience.connect_s)
        connection.connect()
        connection.sock.settimeout(self._patience.silence_s)
        self._connection = connection
        return connection

    def _check_status(self, answer: http.client.HTTPResponse) -> None:
        if answer.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            return
        with self._said():
            said = answer.read1(_MAX_REASON_BYTES).decode("utf-8", "replace").strip()
        why = f"{answer.status}{f': {said}' if said else ''}"
        match answer.status:
            case HTTPStatus.UNAUTHORIZED:
                wrong = "is not the one" if self._token else "is not set"
                raise PeerError(f"{self.peer} asks for a token, and LAMELLA_PEER_TOKEN (or its _FILE) {wrong} here")
            case HTTPStatus.SERVICE_UNAVAILABLE:
                raise PeerCut(f"{self.peer} serves as many others as it may now")
            case _:
                raise PeerError(f"{self.peer} answers {why}")

    def _pieces(self, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        wanted, got = answer.length, 0
        since, had = time.monotonic(), 0
        while True:
            with self._said():
                piece = answer.read1(PIECE_BYTES)
            if not piece:
                break
            yield piece
            got += len(piece)
            now = time.monotonic()
            if now - since >= self._patience.silence_s:
                if got - had < self._patience.least_bytes:
                    raise PeerCut(f"{self.peer} sent {got - had} bytes in {now - since:.0f} s, which is too slow")
                since, had = now, got
        if wanted is not None and got < wanted:
            raise PeerCut(f"{self.peer} closed the connection after {got} of {wanted} bytes")
        answer.close()  # read1 leaves an answer open that was read to its last byte

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """Whatever the network does is a PeerCut."""
        try:
            yield
        except TimeoutError as error:
            raise PeerCut(f"{self.peer} hangs: {error}") from error
        except http.client.HTTPException as error:
            raise PeerCut(f"{self.peer} does not speak HTTP as it should ({type(error).__name__}: {error})") from error
        except OSError as error:
            raise PeerCut(f"{self.peer} cannot be reached ({error.strerror or error})") from error


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
