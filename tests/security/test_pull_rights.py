"""Who may ask a worker for a model: clients, with their own narrow rights, and nobody else."""

from __future__ import annotations

import pytest
import redis

from lamella import operations, pulls
from lamella.acl import Role
from lamella.connection import Connection, Privacy
from lamella.keys import Keys
from tests.security.secured_server import SecuredServer
from tests.security.secured_worker import MODEL, PREFIX, SecuredWorker
from tests.waiting import wait_until

KEYS = Keys(PREFIX)


def test_a_client_asks_a_guarded_worker_and_follows_it(secured: SecuredServer, guarded_worker: SecuredWorker) -> None:
    secured.forget_refusals()
    connection = Connection(secured.url(Role.CLIENT), PREFIX, 20.0, Privacy(None, None))
    (worker,) = connection.run(operations.workers(KEYS))

    ask_id = connection.run(pulls.ask(KEYS, worker.name, MODEL, serve=True))
    ended = wait_until(
        lambda: (
            (found := connection.run(pulls.look(KEYS, worker.name, MODEL, ask_id)).status)
            and found.state.is_final
            and found
        ),
        deadline_s=100,
    )
    connection.close()

    assert ended
    assert "this worker serves it already" in ended.message
    assert [each.name for each in worker.stored] == [MODEL]
    assert secured.refusals() == []


@pytest.mark.parametrize(
    ("role", "command"),
    [
        (Role.MONITOR, ("RPUSH", "pulls:w", "x")),
        (Role.GATEWAY, ("RPUSH", "pulls:w", "x")),
        (Role.CLIENT, ("LPOP", "pulls:w")),
        (Role.CLIENT, ("SET", "pull:w:m", "x")),
        (Role.MONITOR, ("GET", "pull:w:m")),
    ],
)
def test_nobody_else_may(secured: SecuredServer, role: Role, command: tuple[str, ...]) -> None:
    name, key, *values = command

    with secured.login(role) as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(name, PREFIX + key, *values)
