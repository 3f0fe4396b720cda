"""The command line of a worker: ``lamella worker`` and ``python -m lamella_worker``.

Owns options, exit codes and the set-up of logging. Exit codes: 0 after a drain, 1 where the worker cannot serve or
is unhealthy, 2 for a setting that cannot work. Loads celery and the engine, or its process, only once
the device is pinned.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lamella.errors import ConfigError
from lamella.secret_sources import without_password
from lamella_worker.config import WorkerConfig, load_config
from lamella_worker.device import pin_device
from lamella_worker.health import check_worker
from lamella_worker.log_context import ProcessLabels
from lamella_worker.log_setup import set_up_logging
from lamella_worker.worker_error import WorkerError

EXIT_CANNOT_SERVE = 1
EXIT_BAD_SETTING = 2

log = logging.getLogger(__name__)

app = typer.Typer(
    name="worker",
    help="Serve one model from this host, or several in turns.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]


def _redis_url(url: str | None) -> str | None:
    try:
        return without_password(url, "--redis-url")
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


RedisUrlOption = Annotated[
    str | None,
    typer.Option("--redis-url", help="redis://, rediss:// or unix:// URL, without a password.", callback=_redis_url),
]
PrefixOption = Annotated[str | None, typer.Option("--prefix", help="What every Redis key starts with.")]
NameOption = Annotated[str | None, typer.Option("--name", help="The worker's name; no two workers share one.")]


@app.callback(invoke_without_command=True)
def worker(  # noqa: PLR0913  a command has as many arguments as options
    context: typer.Context,
    config: ConfigOption = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="The model to serve; given again, more.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda:N or auto.")] = None,
    store: Annotated[str | None, typer.Option("--store", help="Directory of the shard cache.")] = None,
    slots: Annotated[int | None, typer.Option("--slots", help="Jobs that share a sweep at most.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    vram: Annotated[str | None, typer.Option("--vram", help="GPU memory to take: bytes, 4GiB, 80% or auto.")] = None,
    ram: Annotated[str | None, typer.Option("--ram", help="Host memory for weights, in the same forms.")] = None,
    offline: Annotated[bool | None, typer.Option("--offline/--online", help="Whether to ask the hub.")] = None,
    redis_url: RedisUrlOption = None,
    prefix: PrefixOption = None,
    name: NameOption = None,
    lease_s: Annotated[float | None, typer.Option("--lease-s", help="Seconds a job is ours between signs.")] = None,
    drain_s: Annotated[float | None, typer.Option("--drain-s", help="Seconds a stop takes at most.")] = None,
    isolation: Annotated[
        str | None, typer.Option("--isolation", help="child: the engine in a process of its own; none: in this one.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", help="Serve Prometheus metrics there, or on the next free port.")
    ] = None,
    log_format: Annotated[str | None, typer.Option("--log-format", help="text or json.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
) -> None:
    """Serve one model from this host, or several in turns, until SIGTERM; every option beats the settings file."""
    if context.invoked_subcommand is not None:
        return
    flags: dict[str, object] = {
        "worker.model": model[0] if model and len(model) == 1 else None,
        "worker.models": tuple(model) if model and len(model) > 1 else None,
        "worker.device": device,
        "worker.name": name,
        "worker.lease_s": lease_s,
        "worker.drain_s": drain_s,
        "worker.isolation": isolation,
        "engine.store": store,
        "engine.max_sequences": slots,
        "engine.vram": vram,
        "engine.ram": ram,
        "engine.dtype": dtype,
        "engine.offline": offline,
        "redis.url": redis_url,
        "redis.prefix": prefix,
        "telemetry.metrics_port": metrics_port,
        "telemetry.log_format": log_format,
    }
    settings = _load(config, flags)
    labels = ProcessLabels(settings.telemetry.log_format, settings.worker.name, ",".join(settings.worker.served))
    set_up_logging(is_verbose=verbose, labels=labels)
    raise typer.Exit(_serve(settings))


@app.command()
def health(
    config: ConfigOption = None,
    redis_url: RedisUrlOption = None,
    prefix: PrefixOption = None,
    name: NameOption = None,
    longest_sweep_s: Annotated[float, typer.Option(min=1.0, help="A sweep that takes longer is stuck.")] = 900.0,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for Redis.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Exit 0 only if this worker (by --name, else any of this host) writes heartbeats and gets on with its jobs."""
    flags: dict[str, object] = {"redis.url": redis_url, "redis.prefix": prefix, "worker.name": name}
    settings = _load(config, flags, any_model=True)
    result = check_worker(settings.redis, settings.worker.name, longest_sweep_s, timeout_s)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    else:
        typer.echo(result.reason, err=not result.is_healthy)
    raise typer.Exit(0 if result.is_healthy else EXIT_CANNOT_SERVE)


def _load(path: Path | None, flags: dict[str, object], *, any_model: bool = False) -> WorkerConfig:
    try:
        return load_config(path, flags, defaults={"worker.model": "any"} if any_model else {})
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_BAD_SETTING) from error


def _serve(config: WorkerConfig) -> int:
    try:
        device = pin_device(config.worker.device)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        return EXIT_BAD_SETTING
    try:
        for model in config.worker.served:
            config.security.admitted(model)
        from lamella_worker.process import serve  # loads the engine's types, and then the engine

        return serve(config, device)
    except ImportError as error:
        typer.echo(f'error: {error}; a worker needs more packages: pip install "lamella[worker]"', err=True)
        return EXIT_CANNOT_SERVE
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        return EXIT_BAD_SETTING
    except WorkerError as error:
        log.debug("the worker cannot serve", exc_info=True)
        typer.echo(f"error: {error}", err=True)
        return EXIT_CANNOT_SERVE
