"""`lamella acl` and `lamella key`: what an operator needs to close a server and to encrypt what lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.acl import Role, admin_lines, user_line
from lamella.cli import options
from lamella.key_ring import new_key_line
from lamella.secret_sources import read_secret

PasswordFiles = list[Path] | None


def acl(  # noqa: PLR0913  one argument for each option
    prefix: options.Prefix = options.DEFAULT,
    client: Annotated[
        PasswordFiles, typer.Option("--client-password-file", help="File with the clients' password; repeatable.")
    ] = None,
    gateway: Annotated[
        PasswordFiles, typer.Option("--gateway-password-file", help="File with the gateways' password; repeatable.")
    ] = None,
    worker: Annotated[
        PasswordFiles, typer.Option("--worker-password-file", help="File with the workers' password; repeatable.")
    ] = None,
    monitor: Annotated[
        PasswordFiles, typer.Option("--monitor-password-file", help="File with the monitors' password; repeatable.")
    ] = None,
    metrics: Annotated[
        PasswordFiles, typer.Option("--metrics-password-file", help="File with the password of metrics; repeatable.")
    ] = None,
    admin: Annotated[
        PasswordFiles, typer.Option("--admin-password-file", help="File with the administrator's password; repeatable.")
    ] = None,
    database: Annotated[int, typer.Option("--db", min=0, max=9999, help="Number of the database in the URLs.")] = 0,
    role: Annotated[Role | None, typer.Option("--role", help="Print this role's line only.")] = None,
) -> None:
    """Print the server's ACL file (`aclfile`) for a prefix: lamella-client, -gateway, -worker, -monitor, -metrics.

    Files hold a password each, which is printed as a hash; a file given twice under one option makes two passwords
    valid at once. A role without a password is off. Only the administrator may do what Lamella itself never does.
    """
    files = {
        Role.CLIENT: client,
        Role.GATEWAY: gateway,
        Role.WORKER: worker,
        Role.MONITOR: monitor,
        Role.METRICS: metrics,
    }
    for line in admin_lines(_passwords(admin, "--admin-password-file")) if role is None else []:
        typer.echo(line)
    for each, given in files.items():
        passwords = _passwords(given, f"--{each.value}-password-file")
        if role in (None, each):
            typer.echo(user_line(each, prefix, passwords, database))


def key(key_id: Annotated[str, typer.Argument(help="The key's name: letters, digits and _ . -")]) -> None:
    """Print a line with a new random key for the encryption key file of clients and workers.

    The first line of that file is used to encrypt, all of them to decrypt. Keep the file where only they can read it:
    who has it and the server's data reads everything, and without it nobody does.
    """
    typer.echo(new_key_line(key_id))


def _passwords(files: PasswordFiles, option: str) -> list[str]:
    return [read_secret(path, option) for path in files or ()]
