"""``lamella keys``: make API keys of the gateway, list them, tell what they used, revoke them.

With the server's users of ``lamella acl`` this is the administrator's: a gateway reads keys and makes none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, TypeVar

import typer

from lamella.cli import options
from lamella.cli.output import age, echo_columns, echo_json
from lamella.connection import Connection
from lamella.errors import ConfigError, LamellaError, RequestError
from lamella.steps import Operation
from lamella_gateway.api_keys import (
    ApiKey,
    Endpoint,
    list_keys,
    make_key,
    read_use,
    revoke_key,
    shown_key,
    store_key,
)

TIMEOUT_S = 10.0
Result = TypeVar("Result")

app = typer.Typer(
    name="keys", help="API keys of the HTTP gateway.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.command()
def create(  # noqa: PLR0913  one argument for each option
    name: Annotated[str, typer.Argument(help="What the key is for; shown in lists.")],
    user: Annotated[
        str | None, typer.Option("--user", help="Whose jobs they are in the fair queue. Default: the key's name.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model it may use; repeatable. Default: all.")
    ] = None,
    endpoint: Annotated[
        list[Endpoint] | None, typer.Option("--endpoint", help="What it may call; repeatable. Default: all.")
    ] = None,
    rpm: Annotated[
        int | None, typer.Option("--requests-per-minute", min=1, help="Jobs it may ask for in a minute.")
    ] = None,
    tpd: Annotated[
        int | None, typer.Option("--tokens-per-day", min=1, help="Tokens it may use on a day (UTC), prompts included.")
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="It also sees workers and everybody's jobs, and cancels and retries those.")
    ] = False,
    as_json: options.AsJson = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Make a key and print it, once: only a hash of it is kept."""
    key, secret = _checked(
        lambda: make_key(
            name,
            user or name,
            models=None if model is None else tuple(model),
            endpoints=None if endpoint is None else tuple(endpoint),
            requests_per_minute=rpm,
            tokens_per_day=tpd,
            is_admin=admin,
        )
    )
    with _Books(redis_url, prefix) as books:
        books.run(store_key(books.connection.keys, key, secret))
    if as_json:
        echo_json({**key.model_dump(mode="json"), "key": shown_key(key, secret)})
        return
    typer.echo(shown_key(key, secret))
    typer.echo(f"key {key.key_id} of user {key.user}; it is not shown again", err=True)


@app.command("list")
def show(
    as_json: options.AsJson = False, redis_url: options.RedisUrl = None, prefix: options.Prefix = options.DEFAULT
) -> None:
    """List all keys with what they may do."""
    with _Books(redis_url, prefix) as books:
        keys = books.run(list_keys(books.connection.keys))
    if as_json:
        echo_json(keys)
        return
    rows = [
        [
            *(key.key_id, key.name, key.user, _listed(key.models), _listed(key.endpoints)),
            *("yes" if key.is_admin else "no",),
            *(_number(key.requests_per_minute), _number(key.tokens_per_day), age(key.created_at), _state(key)),
        ]
        for key in keys
    ]
    header = ["id", "name", "user", "models", "endpoints", "admin", "requests/min", "tokens/day", "age", "state"]
    echo_columns(header, rows)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `lamella keys list` shows it.")],
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Make a key useless from its next request on; requests under way go on."""
    with _Books(redis_url, prefix) as books:
        key = books.run(revoke_key(books.connection.keys, key_id))
    typer.echo(f"key {key.key_id} ({key.name}) is revoked")


@app.command()
def usage(
    as_json: options.AsJson = False, redis_url: options.RedisUrl = None, prefix: options.Prefix = options.DEFAULT
) -> None:
    """Tell what each key has used: requests and tokens since it was made, tokens today (UTC)."""
    with _Books(redis_url, prefix) as books:
        keys = books.run(list_keys(books.connection.keys))
        uses = books.run(read_use(books.connection.keys, [key.key_id for key in keys]))
    if as_json:
        typed: list[dict[str, object]] = [
            {"key_id": key.key_id, "name": key.name, "user": key.user, **use._asdict()}
            for key, use in zip(keys, uses, strict=True)
        ]
        echo_json({"keys": typed})
        return
    rows = [
        [
            *(key.key_id, key.name, str(use.requests), str(use.prompt_tokens), str(use.completion_tokens)),
            *(str(use.tokens_today), "never" if use.last_used_at is None else f"{age(use.last_used_at)} ago"),
        ]
        for key, use in zip(keys, uses, strict=True)
    ]
    echo_columns(["id", "name", "requests", "prompt tokens", "completion tokens", "tokens today", "last used"], rows)


class _Books:
    """A connection for the time of one command; what goes wrong is one message and an exit code."""

    def __init__(self, redis_url: str | None, prefix: str) -> None:
        self.connection = _checked(lambda: Connection(redis_url, prefix, TIMEOUT_S))

    def __enter__(self) -> _Books:
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()

    def run(self, operation: Operation[Result]) -> Result:
        return _checked(lambda: self.connection.run(operation))


def _checked(call: Callable[[], Result]) -> Result:
    try:
        return call()
    except LamellaError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, RequestError | ConfigError) else 1) from error


def _listed(values: tuple[str, ...] | None) -> str:
    return "all" if values is None else ",".join(values) or "none"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _state(key: ApiKey) -> str:
    if key.revoked_at is None:
        return "valid"
    return f"revoked {datetime.fromtimestamp(min(key.revoked_at, time.time()), UTC):%Y-%m-%d}"
