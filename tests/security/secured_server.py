"""A real server that asks everybody for a name and a password, with the users that `lamella acl` prints."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import redis

from lamella.acl import Role, admin_lines, user_line
from lamella.child_process import start_child, stop_child
from lamella.embedded import server_program
from tests.waiting import wait_until

# Characters that a URL must escape, so that every test also shows that they are.
PASSWORDS = {
    Role.CLIENT: "cl/ient pw@1",
    Role.GATEWAY: "gate:way pw%4",
    Role.WORKER: "wor?ker#pw:2",
    Role.MONITOR: "mon%itor&pw=3",
    Role.METRICS: "met+rics pw=5",
}
ADMIN_PASSWORD = "ad-min-4"


class SecuredServer:
    """A running server; `url` gives the address of a role's user."""

    def __init__(self, socket: Path, port: int, prefix: str) -> None:
        self.socket = socket
        self.port = port
        self.prefix = prefix

    def url(self, role: Role) -> str:
        return f"unix://lamella-{role.value}:{quote(PASSWORDS[role], safe='')}@{self.socket}?db=0"

    def bare_url(self, role: Role) -> str:
        """The address with the user and without the password."""
        return f"unix://lamella-{role.value}@{self.socket}?db=0"

    @contextmanager
    def login(self, role: Role) -> Iterator[redis.Redis]:
        with self._login(f"lamella-{role.value}", PASSWORDS[role]) as client:
            yield client

    @contextmanager
    def admin(self) -> Iterator[redis.Redis]:
        with self._login("lamella-admin", ADMIN_PASSWORD) as client:
            yield client

    def refusals(self) -> list[str]:
        """What the server refused anybody so far, newest first."""
        with self.admin() as admin:
            return [f"{entry['username']}: {entry['context']} {entry['object']}" for entry in admin.acl_log()]

    def forget_refusals(self) -> None:
        with self.admin() as admin:
            admin.acl_log_reset()

    @contextmanager
    def _login(self, name: str, password: str) -> Iterator[redis.Redis]:
        client = redis.Redis(
            unix_socket_path=str(self.socket),
            username=name,
            password=password,
            protocol=2,
            decode_responses=True,
            socket_timeout=40,
        )
        try:
            yield client
        finally:
            client.close()


@contextmanager
def secured_server(
    directory: Path, prefix: str, *, port: int = 0, requires: tuple[str, ...] = ()
) -> Iterator[SecuredServer]:
    """Run a server with every role's user in `directory`, whose path must be short enough for a socket."""
    users = directory / "users.acl"
    lines = [*admin_lines([ADMIN_PASSWORD]), *(user_line(role, prefix, [PASSWORDS[role]]) for role in Role)]
    users.write_text("\n".join(lines) + "\n")
    server = SecuredServer(directory / "s", port, prefix)
    settings = ["--port", str(port), "--unixsocket", str(server.socket), "--dir", str(directory), "--save", ""]
    command = [str(server_program()), *settings, "--aclfile", str(users), *requires]
    with (directory / "server.log").open("ab") as log:
        process = start_child(command, death_signal=signal.SIGKILL, output=log)
    try:
        wait_until(lambda: server.socket.exists() or process.poll() is not None)
        assert process.poll() is None, (directory / "server.log").read_text()
        wait_until(lambda: _answers(server))
        yield server
    finally:
        _stop(process)


def _answers(server: SecuredServer) -> bool:
    try:
        with server.admin() as admin:
            return bool(admin.ping())
    except redis.ConnectionError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert stop_child(process, grace_s=40.0)
