"""Which hosts may be asked for shards, and the word they ask for: addresses and tokens as settings give them.

Owns their form and nothing that speaks to anyone. Neighbours: `peer_client` asks the peers, `peer_server` is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from lamella_engine.errors import OptionError

PEERS_VARIABLE = "LAMELLA_PEERS"
TOKEN_VARIABLE = "LAMELLA_PEER_TOKEN"
FILE_SUFFIX = "_FILE"
MAX_PEERS = 64
_MAX_TOKEN_BYTES = 4096
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class PeerAddress:
    """Where a peer listens.

    Attributes:
        scheme: ``http`` or ``https``.
        host, port: as given, or the scheme's usual port.
    """

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> PeerAddress:
        """Read ``http://host:port`` or ``https://host:port``.

        Raises:
            OptionError: it is not of that form.
        """
        try:
            parts = urlsplit(text.strip())
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise OptionError(f"the peer {text[:200]!r} cannot be read ({error}); use http://HOST:PORT") from error
        if parts.username or parts.password:
            # Not repeated: it holds a secret.
            raise OptionError(f"a peer's address carries a password; leave it out and set {TOKEN_VARIABLE}")
        is_bare = parts.path in ("", "/") and not parts.query and not parts.fragment
        if parts.scheme not in _PORTS or not host or not is_bare or not text.isprintable() or " " in text.strip():
            raise OptionError(f"the peer {text[:200]!r} is not of the form http://HOST:PORT or https://HOST:PORT")
        return cls(parts.scheme, host, port or _PORTS[parts.scheme])


@dataclass(frozen=True)
class Patience:
    """How long a peer may take.

    Attributes:
        connect_s: seconds to take the connection.
        answer_s: seconds to begin an answer.
        silence_s: seconds between two pieces of a body.
        least_bytes: what must come in every `silence_s` seconds, so that a byte now and then does not count.
        retries: how often the files of a fetch may be cut and go on.
        pause_s: seconds before the first retry; doubles up to 5.
    """

    connect_s: float = 10.0
    answer_s: float = 30.0
    silence_s: float = 30.0
    least_bytes: int = 65_536
    retries: int = 8
    pause_s: float = 0.2


USUAL = Patience()


@dataclass(frozen=True)
class Peers:
    """The peers to ask, in this order, the token they ask for, and how long they may take; empty asks nobody."""

    addresses: tuple[PeerAddress, ...] = ()
    token: str | None = field(default=None, repr=False)
    patience: Patience = USUAL

    def __bool__(self) -> bool:
        return bool(self.addresses)

    @classmethod
    def named(cls, addresses: Iterable[str], environ: Mapping[str, str] | None = None) -> Peers:
        """The peers of these addresses, each once, with the token of the environment.

        Raises:
            OptionError: an address or the token cannot be used, or there are too many.
        """
        parsed = tuple(dict.fromkeys(map(PeerAddress.parse, addresses)))
        if len(parsed) > MAX_PEERS:
            raise OptionError(f"{len(parsed)} peers are too many; name at most {MAX_PEERS}")
        return cls(parsed, peer_token(environ) if parsed else None)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Peers:
        """The peers that LAMELLA_PEERS names, separated by commas.

        Raises:
            OptionError: as for `named`.
        """
        env = os.environ if environ is None else environ
        return cls.named(split_peers(env.get(PEERS_VARIABLE, "")), env)


def split_peers(text: str) -> tuple[str, ...]:
    """The addresses in a list separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def peer_token(environ: Mapping[str, str] | None = None) -> str | None:
    """The token in LAMELLA_PEER_TOKEN, or in the file that LAMELLA_PEER_TOKEN_FILE names; None if there is none.

    Raises:
        OptionError: both are set, or what is set cannot be a token.
    """
    env = os.environ if environ is None else environ
    direct, file = env.get(TOKEN_VARIABLE), env.get(TOKEN_VARIABLE + FILE_SUFFIX)
    if direct and file:
        raise OptionError(f"{TOKEN_VARIABLE} and {TOKEN_VARIABLE}{FILE_SUFFIX} are both set; set one of them")
    token, place = (direct, TOKEN_VARIABLE) if not file else (_read(Path(file)), f"the file of {TOKEN_VARIABLE}_FILE")
    if not token:
        return None
    if not token.isascii() or not token.isprintable() or " " in token:
        raise OptionError(f"{place} must hold one word of ASCII letters, digits and signs, without spaces")
    return token


def _read(path: Path) -> str:
    name = f"{TOKEN_VARIABLE}{FILE_SUFFIX} names {str(path)!r}"
    try:
        with path.expanduser().open("rb") as file:
            raw = file.read(_MAX_TOKEN_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise OptionError(f"{name}, which cannot be read ({why}); name a file that this user may read") from error
    if not raw.strip() or len(raw) > _MAX_TOKEN_BYTES:
        raise OptionError(f"{name}, which must hold one word of at most {_MAX_TOKEN_BYTES} bytes")
    return raw.decode("utf-8", "replace").rstrip("\r\n")
