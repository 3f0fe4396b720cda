"""Options that several commands share, and what is made of them."""

from __future__ import annotations

from typing import Annotated

import typer

from lamella.cli.complete import complete_model
from lamella.client import Client
from lamella.errors import ConfigError
from lamella.keys import DEFAULT_PREFIX
from lamella.request_draft import SubmitOptions
from lamella.secret_sources import without_password


def _redis_url(url: str | None) -> str | None:
    try:
        return without_password(url, "--redis-url")
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        callback=_redis_url,
        help="redis://, rediss:// or unix:// URL, without password. Default: LAMELLA_REDIS_URL, else the running "
        "`lamella up`, else redis://127.0.0.1:6379/0.",
    ),
]
Prefix = Annotated[str, typer.Option("--prefix", help="What every Redis key of the service starts with.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WithStats = Annotated[bool, typer.Option("--stats", help="Print tokens, speed, sweeps and memory at the end.")]
TimeoutS = Annotated[float, typer.Option("--timeout", help="Seconds to wait for the job's end; the job goes on.")]
Store = Annotated[
    str | None,
    typer.Option("--store", help="Directory of the shard cache. Default: LAMELLA_STORE, else ~/.cache/lamella/shards."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Model name. Default: the only one that is served.", autocompletion=complete_model
    ),
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Tokens to generate at most (256).")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 (default) is greedy.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Draw from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Draw from the most likely tokens that sum to p.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Leave out tokens below p times the most likely one.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Fixes the random draws.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the answer; repeatable.")]

DEFAULT = DEFAULT_PREFIX


def open_client(redis_url: str | None, prefix: str = DEFAULT_PREFIX) -> Client:
    """Return a client for the options given."""
    return Client(redis_url, prefix=prefix)


def sampling_options(
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: list[str] | None = None,
) -> SubmitOptions:
    """Return the sampling keys that were given; the others keep their defaults."""
    options = SubmitOptions()
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    if top_k is not None:
        options["top_k"] = top_k
    if top_p is not None:
        options["top_p"] = top_p
    if min_p is not None:
        options["min_p"] = min_p
    if seed is not None:
        options["seed"] = seed
    if stop:
        options["stop"] = stop
    return options
