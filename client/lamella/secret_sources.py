"""Where secrets come from: an environment variable, or a file that another variable names; never a command line.

Owns the rule ``NAME`` or ``NAME_FILE`` (not both), the reading of small secret files, and how the server's password
gets into a URL that has none. Knows no server and opens no connection. Neighbours: `server_url` (which URL),
`key_ring` (encryption keys), the worker's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from lamella.errors import ConfigError

URL_VARIABLE = "LAMELLA_REDIS_URL"
PASSWORD_VARIABLE = "LAMELLA_REDIS_PASSWORD"
FILE_SUFFIX = "_FILE"
MAX_SECRET_BYTES = 65_536
# What a process that speaks to no server (the engine's) is not given.
SERVER_VARIABLES = tuple(name + end for name in (URL_VARIABLE, PASSWORD_VARIABLE) for end in ("", FILE_SUFFIX))


def secret_from(environ: Mapping[str, str], variable: str) -> str | None:
    """Return the secret that `variable` holds, or that the file named by `variable` + ``_FILE`` holds, else None.

    Raises:
        ConfigError: both are set, or the file cannot be used.
    """
    direct, file = environ.get(variable), environ.get(variable + FILE_SUFFIX)
    if direct and file:
        raise ConfigError(f"{variable} and {variable}{FILE_SUFFIX} are both set; set one of them")
    if file:
        return read_secret(Path(file), f"{variable}{FILE_SUFFIX}")
    return direct or None


def read_secret(path: Path, source: str) -> str:
    """Return the one line that a secret file holds; `source` says who names the file, for the error.

    Raises:
        ConfigError: it cannot be read, is empty, too long, or holds more than one line of text.
    """
    try:
        with path.expanduser().open("rb") as file:
            raw = file.read(MAX_SECRET_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(
            f"{source} names {str(path)!r}, which cannot be read ({why}); name a file that this user may read"
        ) from error
    if len(raw) > MAX_SECRET_BYTES:
        raise ConfigError(
            f"{source} names {str(path)!r}, which is longer than {MAX_SECRET_BYTES} bytes; is it the file?"
        )
    try:
        secret = raw.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        secret = "\0"
    if not secret or not secret.isprintable():
        # What the file holds is not repeated and the cause not chained: it may be the secret.
        raise ConfigError(f"{source} names {str(path)!r}, which must hold one line of text and nothing else") from None
    return secret


def has_password(url: str) -> bool:
    """True if `url` carries a password, in its front part or as an option."""
    try:
        parts = urlsplit(url)
        return bool(parts.password) or any(key == "password" for key, _ in parse_qsl(parts.query))
    except ValueError:
        return "@" in url or "password=" in url


def with_password(url: str, environ: Mapping[str, str]) -> str:
    """Return `url` with the password of LAMELLA_REDIS_PASSWORD (or ``_FILE``) if it has none.

    A unix socket's URL is completed only if it names a user: the private server of `lamella up` has no passwords.

    Raises:
        ConfigError: the password cannot be read.
    """
    if has_password(url):
        return url
    try:
        parts = urlsplit(url)
        user = parts.username or dict(parse_qsl(parts.query)).get("username", "")
    except ValueError:
        return url  # its form is wrong, which `check_url` says
    if parts.scheme == "unix" and not user:
        return url
    password = secret_from(environ, PASSWORD_VARIABLE)
    if password is None:
        return url
    place = parts.netloc.rpartition("@")[2]
    login = f"{parts.username or quote(user, safe='')}:{quote(password, safe='')}"
    options = "&".join(pair for pair in parts.query.split("&") if not pair.startswith("username="))
    return urlunsplit((parts.scheme, f"{login}@{place}", parts.path, options, ""))


def only_url(url: str) -> dict[str, str]:
    """Return the variables for a child process that is to use `url` as it is, whatever else is set here."""
    return {**dict.fromkeys(SERVER_VARIABLES, ""), URL_VARIABLE: url}


def without_password(url: str | None, option: str) -> str | None:
    """Return `url`, which came from the command line, if it carries no password.

    Raises:
        ConfigError: it does; every user of the machine can read command lines.
    """
    if url is not None and has_password(url):
        raise ConfigError(
            f"{option} carries a password, and every user of this machine can read command lines; leave it out there "
            f"and put it into {PASSWORD_VARIABLE}, or into a file that {PASSWORD_VARIABLE}{FILE_SUFFIX} names, or put "
            f"the whole URL into {URL_VARIABLE}"
        )
    return url
