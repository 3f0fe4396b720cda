"""What a gateway was started with: one frozen object, checked before anything listens."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from lamella.errors import ConfigError
from lamella.keys import DEFAULT_PREFIX
from lamella.service_state import state_dir

DEFAULT_PORT = 8080
MIB = 1024 * 1024
_POSITIVE = (
    *("max_body_bytes", "max_open_streams", "max_request_s", "keep_alive_s", "default_max_tokens"),
    *("max_file_bytes", "max_storage_bytes", "max_batches"),
)
_ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9.\-\[\]:]+", re.ASCII)


@dataclass(frozen=True)
class Settings:
    """Settings of one gateway.

    Attributes:
        redis_url: the queue's server; None as for `lamella.AsyncClient`.
        prefix: what every Redis key of the service starts with.
        host: address to listen on.
        port: port to listen on; 0 takes any.
        requires_key: whether requests need an API key; False only where `host` is this machine alone.
        cors_origins: origins whose pages may call; ``*`` is any.
        max_body_bytes: larger request bodies are refused.
        max_open_streams: as many requests may wait for tokens at once; one more is told to come back.
        max_request_s: a request that takes longer is ended, and its jobs with it.
        keep_alive_s: a waiting answer gets a sign of life after so long in silence; so long its status stays open.
        default_max_tokens: tokens of a chat or response that names no limit, if the model's context has room for them.
        grace_s: how long open requests may go on once the gateway is told to stop.
        files_dir: where files and batches are kept; None is ``gateway`` in the directory of what outlives a run.
        max_file_bytes: larger files are refused.
        max_storage_bytes: what the files of one API key may have together.
        max_batches: as many batches run here at once.
    """

    redis_url: str | None = None
    prefix: str = DEFAULT_PREFIX
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    requires_key: bool = True
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * MIB
    max_open_streams: int = 2000
    max_request_s: float = 3600.0
    keep_alive_s: float = 1.0
    default_max_tokens: int = 4096
    grace_s: float = 10.0
    files_dir: Path | None = None
    max_file_bytes: int = 200 * MIB
    max_storage_bytes: int = 2048 * MIB
    max_batches: int = 16

    @property
    def files_root(self) -> Path:
        """The directory of files and batches."""
        return state_dir() / "gateway" if self.files_dir is None else self.files_dir.expanduser().absolute()

    def __post_init__(self) -> None:
        """Raise ConfigError for what cannot work."""
        if not self.requires_key and not is_loopback(self.host):
            raise ConfigError(
                f"--no-auth with --host {self.host}: without keys a gateway listens on this machine only; "
                "use --host 127.0.0.1, or leave --no-auth out and make keys with `lamella keys create`"
            )
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"--cors-origin {origin[:80]!r}: use scheme and host, such as https://example.org")
        if "*" in self.cors_origins and not self.requires_key:
            raise ConfigError("--cors-origin '*' with --no-auth lets every web page use this machine; name the origins")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; use a number above 0")


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
