"""Which server to speak to, and how to speak *of* it: the URL's choice, and its form without credentials.

Order: the argument, LAMELLA_REDIS_URL (or the file LAMELLA_REDIS_URL_FILE names), the server of a running `lamella up`,
and last ``redis://127.0.0.1:6379/0``. A URL without a password gets the one of LAMELLA_REDIS_PASSWORD. Neighbours:
`secret_sources` (environment and files), `service_state` (the running service), `connection` (which opens the URL).
"""

from __future__ import annotations

import os
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from lamella.errors import ConfigError
from lamella.secret_sources import FILE_SUFFIX, URL_VARIABLE, secret_from, with_password
from lamella.service_state import running_service

DEFAULT_URL = "redis://127.0.0.1:6379/0"
SCHEMES = ("redis", "rediss", "unix")
TLS_OPTIONS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
TLS_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
URL_OPTIONS = ("db", "username", "password", *TLS_OPTIONS)


def resolve_url(url: str | None) -> str:
    """Return the URL to use, checked for its form, with its password.

    Raises:
        ConfigError: it is not of the form redis://, rediss:// or unix://, or a file it needs cannot be read.
    """
    if url is not None:
        return with_password(check_url(url, "the Redis URL"), os.environ)
    if from_environment := secret_from(os.environ, URL_VARIABLE):
        return with_password(check_url(from_environment, URL_VARIABLE), os.environ)
    if service := running_service():
        return service.url
    return with_password(DEFAULT_URL, os.environ)


def is_named(url: str | None) -> bool:
    """True if an argument or the environment names a server, or one of `lamella up` is running."""
    variables = (URL_VARIABLE, URL_VARIABLE + FILE_SUFFIX)
    return url is not None or any(os.environ.get(name) for name in variables) or running_service() is not None


def check_url(url: str, source: str) -> str:
    """Return `url` if it can be a server's; `source` names where it came from, for the error."""
    forms = "redis://[user:password@]host:port/db, rediss://... for TLS, or unix:///path/to/socket?db=0"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in SCHEMES and bool(parts.path if parts.scheme == "unix" else parts.hostname)
        usable = usable and (parts.port is None or parts.port > 0) and _database_is_a_number(parts)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
    except ValueError:
        usable, options = False, {}
    if not usable:
        # The URL itself is not repeated and the cause not chained: either may hold a password.
        raise ConfigError(
            f"{source} is not a server URL; use {forms} (special characters in a password percent-encoded)"
        ) from None
    if unknown := [key for key in options if key not in URL_OPTIONS]:
        raise ConfigError(f"{source} has the unknown option {unknown[0]!r}; known options: {', '.join(URL_OPTIONS)}")
    if complaint := tls_complaint(parts.scheme, options):
        raise ConfigError(f"{source} {complaint}")
    return url


def tls_complaint(scheme: str, options: dict[str, str]) -> str | None:
    """Say what is wrong with the options for TLS, or nothing."""
    given = [key for key in options if key in TLS_OPTIONS]
    if given and scheme != "rediss":
        return f"has the option {given[0]}, but speaks no TLS: begin it with rediss:// instead of {scheme}://"
    if options.get("ssl_cert_reqs", "required") not in ("required", "optional", "none"):
        return "has an ssl_cert_reqs that is none of required, optional and none"
    if options.get("ssl_check_hostname", "true").lower() not in ("true", "false"):
        return "has an ssl_check_hostname that is neither true nor false"
    if bool(options.get("ssl_certfile")) != bool(options.get("ssl_keyfile")):
        return "needs both ssl_certfile and ssl_keyfile for a client certificate: give the other one as well"
    for key in TLS_FILES:
        if key in options and not os.access(options[key], os.R_OK):
            return f"names {options[key]!r} as {key}, which cannot be read; name a file that this user may read"
    return None


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
