"""``lamella metrics``: the metrics of all workers together, for Prometheus, and the list of workers to scrape.

Owns the command: one process beside Redis, which needs no worker and loads no engine. What it tells is in
`metrics_fleet`.
"""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from prometheus_client import CollectorRegistry

from lamella.errors import ConfigError
from lamella.keys import Keys
from lamella_worker.config import load_config
from lamella_worker.log_context import ProcessLabels
from lamella_worker.log_setup import set_up_logging
from lamella_worker.metrics_fleet import FleetCollector, FleetReader, targets
from lamella_worker.metrics_server import MetricsServer, PortTaken
from lamella_worker.registry import open_redis

DEFAULT_PORT = 9463
REDIS_TIMEOUT_S = 5.0
_LOOK_S = 1.0

log = logging.getLogger(__name__)

app = typer.Typer(name="metrics", help="Serve the metrics of all workers together.", pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def metrics(
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port, or the first free one after it; 0 takes any.")
    ] = DEFAULT_PORT,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; there is no password.")] = "127.0.0.1",
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of settings, for [redis].")] = None,
    redis_url: Annotated[str | None, typer.Option("--redis-url", help="redis://, rediss:// or unix:// URL.")] = None,
    prefix: Annotated[str | None, typer.Option("--prefix", help="What every Redis key starts with.")] = None,
) -> None:
    """Serve /metrics (queues, workers, dead jobs) and /targets (for Prometheus's http_sd_configs) until SIGTERM."""
    try:
        flags: dict[str, object] = {"redis.url": redis_url, "redis.prefix": prefix}
        settings = load_config(config, flags, defaults={"worker.model": "any"})
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    set_up_logging(is_verbose=False, labels=ProcessLabels(settings.telemetry.log_format))
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    client = open_redis(settings.redis.url.get_secret_value(), REDIS_TIMEOUT_S)
    reader = FleetReader(client, Keys(settings.redis.prefix))
    registry = CollectorRegistry()
    registry.register(FleetCollector(reader.read))
    try:
        server = MetricsServer(host, port, registry, lambda: targets(reader.read()))
    except PortTaken as error:
        client.close()
        typer.echo(f"error: {error}; give --port another one", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"metrics of the whole service on http://{server.address}/metrics", err=True)
    while not stop.wait(_LOOK_S):
        pass
    server.close()
    client.close()
