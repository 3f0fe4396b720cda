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


def is_passing(error: Exception) -> bool:
    """True if trying again may help: no answer, a cut connection, a server still loading its data."""
    if isinstance(error, (rx.AuthenticationError, rx.AuthorizationError, rx.MaxConnectionsError)):
        return False
    return isinstance(error, (rx.ConnectionError, rx.TimeoutError, rx.TryAgainError, OSError))


def translated(error: Exception, url: str) -> ServerError:
    """Return the error to raise in place of `error`, one of redis-py's or the operating system's."""
    server = public_url(url)
    said = without_secrets(str(error), url)
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
            f"no answer from the server at {server} ({reason}). Start one with `lamella up`, "
            "or name another with --redis-url or LAMELLA_REDIS_URL."
        )
    return ServerRefused(f"the server at {server} answered with an error: {said[:300]}")
