"""``lamella models share``: lets other hosts fetch what this host's store has.

Owns the command's arguments and its life from start to signal; `peer_server` does the work.
"""

from __future__ import annotations

import ipaddress
import logging
import signal
import sys
import threading
from types import FrameType
from typing import Annotated

import typer

from lamella_engine.byte_size import byte_size
from lamella_engine.cli_options import StoreOption, open_store, plain_errors, wrong_calls
from lamella_engine.errors import OptionError
from lamella_engine.peer_address import TOKEN_VARIABLE, peer_token
from lamella_engine.peer_server import AT_ONCE, PeerServer

DEFAULT_LISTEN = "127.0.0.1:9530"
_LOOK_S = 0.5


ListenOption = Annotated[str, typer.Option("--listen", help="Where: HOST:PORT; port 0 takes a free one.")]


def share(
    listen: ListenOption = DEFAULT_LISTEN,
    store: StoreOption = None,
    connections: Annotated[
        int, typer.Option("--connections", min=1, max=1024, help="Connections served at once; more are turned away.")
    ] = AT_ONCE,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print each request.")] = False,
) -> None:
    """Share this host's complete models over HTTP, read-only, until SIGTERM; others fetch with `pull NAME --from`.

    LAMELLA_PEER_TOKEN, or the file that LAMELLA_PEER_TOKEN_FILE names, holds the token that requests must bring.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr, format="%(message)s")
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    with plain_errors(), wrong_calls():
        host, port = _split(listen)
        token = peer_token()
        opened = open_store(store)
        server = PeerServer(opened, host, port, token=token, at_once=connections)
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, on_signal)
            server.start()
            shared = opened.list()
            nbytes = sum(manifest.size_bytes for manifest in shared)
            typer.echo(f"sharing {len(shared)} models ({byte_size(nbytes)}) of {opened.root} on {server.address}")
            if token is None and not _is_loopback(host):
                typer.echo(
                    f"warning: whoever reaches {server.address} may read these models; set {TOKEN_VARIABLE} to ask "
                    "for a token",
                    err=True,
                )
            while not stop.wait(_LOOK_S):
                pass
        finally:
            server.close()


def _split(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise OptionError(f"--listen is {listen!r}; use HOST:PORT, such as 0.0.0.0:9530")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
