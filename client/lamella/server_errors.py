"""From redis-py's exceptions to ours: what happened, why, and what to do, never with a password.

Owns the wording of ServerUnreachable and ServerRefused. Neighbours: `connection` and the stream readers, which call
`translated` at their edge.
"""

from __future__ import annotations

import redis.exceptions as rx

from lamella.errors import ServerError, ServerRefused, ServerUnreachable
from lamella.server_url import public_url, without_secrets

# What a kind of error means and what to do; redis-py takes the answer's first word away and makes it the kind.
_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (rx.OutOfMemoryError, "its memory is full, so nothing was stored; raise maxmemory or wait for jobs to expire"),
    (rx.ReadOnlyError, "it is a read-only replica; point the URL at the primary"),
    (rx.NoPermissionError, "this user may not do that; widen the user's rights (ACL) on the server"),
)
# The same by a sign in the answer's text.
_SIGNS = (
    ("authentication required", "it asks for a password; put it into the URL: redis://user:password@host:port/db"),
    ("invalid username-password", "the user name or password in the URL is wrong"),
    ("MISCONF", "it cannot write to its disk and so accepts nothing; free or repair the server's disk"),
    ("max number of clients", "it has no connection left; close some clients or raise maxclients"),
    ("unknown command", "it lacks a command that is needed; use Valkey 7.2 or Redis 6.2 or newer"),
    ("DB index is out of range", "the database number in the URL does not exist there; use 0"),
)
# What goes wrong before the server understands a word, by a sign in the text; trying again does not help.
_TLS_SIGNS = (
    (
        "mismatch, certificate is not valid for",
        "its certificate is for another host name; write the name that the certificate has into the URL, or have one "
        "made for this name",
    ),
    ("certificate has expired", "its certificate has expired; renew it on the server"),
    (
        "certificate verify failed",
        "its certificate is not signed by an authority that this machine trusts; name the authority's file in the URL: "
        "rediss://host:port/0?ssl_ca_certs=/path/ca.pem",
    ),
    (
        "certificate required",
        "it asks for a client certificate; name yours in the URL: "
        "?ssl_certfile=/path/cert.pem&ssl_keyfile=/path/key.pem",
    ),
    ("unknown ca", "it does not trust the client certificate in the URL; use one that its authority has signed"),
    ("wrong version number", "this port does not speak TLS; begin the URL with redis://, or use the server's TLS port"),
    ("record layer failure", "this port does not speak TLS; begin the URL with redis://, or use the server's TLS port"),
    (r"\x15\x03", "this port speaks TLS; begin the URL with rediss:// instead of redis://"),
)
_NO_SCRIPTS = (
    "it does not hold the service's scripts, and this user may not load them; a worker loads them when it starts, so "
    "start one, or call again with a user who may"
)


def is_passing(error: Exception) -> bool:
    """True if trying again may help: no answer, a cut connection, a server still loading its data."""
    if isinstance(error, (rx.AuthenticationError, rx.AuthorizationError, rx.MaxConnectionsError)):
        return False
    if tls_trouble(error) is not None:
        return False
    return isinstance(error, (rx.ConnectionError, rx.TimeoutError, rx.TryAgainError, OSError))


def tls_trouble(error: Exception) -> str | None:
    """Return what is wrong between a TLS port and the URL and what to do, or None if this is no such error."""
    said = str(error).lower()
    return next((meaning for sign, meaning in _TLS_SIGNS if sign in said), None)


def translated(error: Exception, url: str) -> ServerError:
    """Return the error to raise in place of `error`, one of redis-py's or the operating system's."""
    server = public_url(url)
    said = without_secrets(str(error), url)
    if trouble := tls_trouble(error):
        return ServerRefused(f"no connection to the server at {server}: {trouble}")
    if isinstance(error, rx.NoScriptError):
        return ServerRefused(f"the server at {server} refused: {_NO_SCRIPTS}")
    for kind, meaning in _KINDS:
        if isinstance(error, kind):
            return ServerRefused(f"the server at {server} refused: {meaning}")
    for sign, meaning in _SIGNS:
        if sign.lower() in str(error).lower():
            return ServerRefused(f"the server at {server} refused: {meaning}")
    if isinstance(error, (rx.AuthenticationError, rx.AuthorizationError)):
        return ServerRefused(f"the server at {server} refused the login; check user name and password in the URL")
    if is_passing(error) or isinstance(error, rx.MaxConnectionsError):
        reason = said.splitlines()[0][:200].rstrip(". ") if said else type(error).__name__
        return ServerUnreachable(
            f"no answer from the server at {server} ({reason}{_other_scheme(server, reason)}). "
            "Start one with `lamella up`, or name another with --redis-url or LAMELLA_REDIS_URL."
        )
    return ServerRefused(f"the server at {server} answered with an error: {said[:300]}")


def _other_scheme(server: str, reason: str) -> str:
    """Say what a port of the other kind looks like from here: it hangs up, or waits for a line that never ends."""
    if server.startswith("redis://") and any(sign in reason for sign in ("closed by server", "reset by peer")):
        return "; if this port speaks TLS, begin the URL with rediss://"
    if server.startswith("rediss://") and "Timeout connecting" in reason:
        return "; if this port does not speak TLS, begin the URL with redis://"
    return ""
