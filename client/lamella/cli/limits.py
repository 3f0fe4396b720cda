"""`lamella limits`: what may wait and run, shown and changed, for all users or for one."""

from __future__ import annotations

from typing import Annotated

import typer

from lamella.cli import options
from lamella.cli.output import echo_json
from lamella.client import Client
from lamella.errors import RequestError
from lamella.limits import LimitChanges, Limits, UserLimitChanges, UserLimits

NO_LIMIT = "none"


def limits(  # noqa: PLR0913  one argument for each option
    user: Annotated[
        str | None, typer.Option("--user", help="Show or change this user's own limits and weight instead.")
    ] = None,
    model_queued: Annotated[
        str | None, typer.Option("--model-queued", metavar="N|none", help="Jobs that may wait for one model.")
    ] = None,
    queued: Annotated[
        str | None, typer.Option("--user-queued", metavar="N|none", help="Jobs of a user that may wait for one model.")
    ] = None,
    running: Annotated[
        str | None,
        typer.Option("--user-running", metavar="N|none", help="Jobs of a user that may be with one model's workers."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option("--user-tokens", metavar="N|none", help="Tokens (prompts, max_tokens) of all a user's jobs."),
    ] = None,
    weight: Annotated[
        str | None, typer.Option("--weight", metavar="W|none", help="With --user: the share, beside 1 of others.")
    ] = None,
    as_json: options.AsJson = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Show the limits, after changing those that are given; 'none' takes one away."""
    given = {"queued": queued, "running": running, "tokens": tokens}
    with options.open_client(redis_url, prefix) as client:
        if user is None:
            if weight is not None:
                raise RequestError("--weight is one user's; name the user with --user")
            found: Limits | UserLimits = _for_all(client, model_queued, given)
        else:
            if model_queued is not None:
                raise RequestError("--model-queued holds for all users; leave out --user")
            found = _for_user(client, user, weight, given)
    if as_json:
        echo_json(found)
        return
    for name, value in found:
        typer.echo(f"{name:<13} {NO_LIMIT if value is None else value}")


def _for_all(client: Client, model_queued: str | None, given: dict[str, str | None]) -> Limits:
    changes = LimitChanges()
    if model_queued is not None:
        changes["model_queued"] = _whole("--model-queued", model_queued)
    if (text := given["queued"]) is not None:
        changes["user_queued"] = _whole("--user-queued", text)
    if (text := given["running"]) is not None:
        changes["user_running"] = _whole("--user-running", text)
    if (text := given["tokens"]) is not None:
        changes["user_tokens"] = _whole("--user-tokens", text)
    return client.set_limits(**changes)


def _for_user(client: Client, user: str, weight: str | None, given: dict[str, str | None]) -> UserLimits:
    changes = UserLimitChanges()
    if weight is not None:
        changes["weight"] = _weight(weight)
    if (text := given["queued"]) is not None:
        changes["queued"] = _whole("--user-queued", text)
    if (text := given["running"]) is not None:
        changes["running"] = _whole("--user-running", text)
    if (text := given["tokens"]) is not None:
        changes["tokens"] = _whole("--user-tokens", text)
    return client.set_user_limits(user, **changes)


def _whole(option: str, text: str) -> int | None:
    if text == NO_LIMIT:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise RequestError(f"{option} is {text[:60]!r}; use a whole number from 0 on, or {NO_LIMIT!r}")
    return int(text)


def _weight(text: str) -> float | None:
    if text == NO_LIMIT:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(f"--weight is {text[:60]!r}; use a number from 0.01 to 100, or {NO_LIMIT!r}") from error
