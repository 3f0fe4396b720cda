"""Which server to speak to, and how to speak *of* it: the URL's choice, and its form without credentials.

Order: the argument, LAMELLA_REDIS_URL, the server of a running `lamella up`, and last ``redis://127.0.0.1:6379/0``.
Neighbours: `service_state` (the running service), `connection` (which opens the URL).
"""

from __future__ import annotations

import os
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from lamella.errors import ConfigError
from lamella.service_state import running_service

DEFAULT_URL = "redis://127.0.0.1:6379/0"
URL_VARIABLE = "LAMELLA_REDIS_URL"
SCHEMES = ("redis", "rediss", "unix")
TLS_OPTIONS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
URL_OPTIONS = ("db", "username", "password", *TLS_OPTIONS)


def resolve_url(url: str | None) -> str:
    """Return the URL to use, checked for its form.

    Raises:
        ConfigError: it is not of the form redis://, rediss:// or unix://.
    """
    if url is not None:
        return check_url(url, "the Redis URL")
    if from_environment := os.environ.get(URL_VARIABLE):
        return check_url(from_environment, URL_VARIABLE)
    service = running_service()
    return service.url if service else DEFAULT_URL


def check_url(url: str, source: str) -> str:
    """Return `url` if it can be a server's; `source` names where it came from, for the error."""
    forms = "redis://[user:password@]host:port/db, rediss://... for TLS, or unix:///path/to/socket?db=0"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in SCHEMES and bool(parts.path if parts.scheme == "unix" else parts.hostname)
        usable = usable and (parts.port is None or parts.port > 0) and _database_is_a_number(parts)
        unknown = [key for key, _ in parse_qsl(parts.query, keep_blank_values=True) if key not in URL_OPTIONS]
    except ValueError:
        usable, unknown = False, []
    if not usable:
        # The URL itself is not repeated and the cause not chained: either may hold a password.
        raise ConfigError(
            f"{source} is not a server URL; use {forms} (special characters in a password percent-encoded)"
        ) from None
    if unknown:
        raise ConfigError(f"{source} has the unknown option {unknown[0]!r}; known options: {', '.join(URL_OPTIONS)}")
    return url


def _database_is_a_number(parts: SplitResult) -> bool:
    in_query = dict(parse_qsl(parts.query, keep_blank_values=True)).get("db")
    in_path = parts.path.strip("/") if parts.scheme != "unix" else ""
    return (in_query is None or in_query.isdecimal()) and (not in_path or in_path.isdecimal())


def public_url(url: str) -> str:
    """Return `url` without credentials and options, fit for messages and logs."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or 6379}{parts.path if parts.path != '/' else ''}"


def without_secrets(text: str, url: str) -> str:
    """Return `text` with the URL's password blotted out."""
    parts = urlsplit(url)
    query = [pair.partition("=")[2] for pair in parts.query.split("&") if pair.startswith("password=")]
    for secret in (parts.password, *query):
        for form in (secret, unquote(secret)) if secret else ():
            text = text.replace(form, "***")
    return text
