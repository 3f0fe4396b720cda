"""``lamella serve``: the HTTP gateway, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import logging
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
import uvicorn

from lamella.cli import options
from lamella.collector import spare_started
from lamella.errors import ConfigError
from lamella_gateway.app import make_app
from lamella_gateway.settings import DEFAULT_PORT, MIB, Settings, is_loopback

BACKLOG = 2048
KEEP_IDLE_S = 75  # a connection without a request is closed after so long

FilesDir = Annotated[
    Path | None,
    typer.Option("--files-dir", help="Where files and batches are kept. Default: `gateway` in LAMELLA_STATE_DIR."),
]
MaxBody = Annotated[
    int, typer.Option("--max-body-mib", min=1, help="Largest request body, in MiB; files have a bound of their own.")
]
MaxStreams = Annotated[
    int, typer.Option("--max-open-streams", min=1, help="Requests that may wait for tokens at once.")
]
MaxRequest = Annotated[float, typer.Option("--max-request-s", min=1, help="A request that takes longer is ended.")]
MaxFile = Annotated[int, typer.Option("--max-file-mib", min=1, help="Largest uploaded file, in MiB.")]
MaxStorage = Annotated[
    int, typer.Option("--max-storage-mib", min=1, help="What the files of one API key may have together, in MiB.")
]
MaxBatches = Annotated[int, typer.Option("--max-batches", min=1, help="Batches that run here at once.")]

log = logging.getLogger(__name__)

app = typer.Typer(
    name="serve", help="Serve the OpenAI API over HTTP in front of the queue.", pretty_exceptions_enable=False
)


@app.callback(invoke_without_command=True)
def serve(  # noqa: PLR0913  one argument for each option
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes any.")
    ] = DEFAULT_PORT,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Ask for no API key; only where --host is this machine alone.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="Origin whose pages may call; repeatable; '*' is any.")
    ] = None,
    max_body: MaxBody = 16,
    max_streams: MaxStreams = 2000,
    max_request_s: MaxRequest = 3600.0,
    max_tokens: Annotated[
        int, typer.Option("--default-max-tokens", min=1, help="Tokens of a chat or response that names no limit.")
    ] = 4096,
    grace_s: Annotated[
        float, typer.Option("--grace-s", min=0, help="Seconds that open requests may go on when it stops.")
    ] = 10.0,
    files_dir: FilesDir = None,
    max_file: MaxFile = 200,
    max_storage: MaxStorage = 2048,
    max_batches: MaxBatches = 16,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Serve the OpenAI API: base_url http://HOST:PORT/v1, keys from `lamella keys create`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = Settings(
            redis_url=redis_url,
            prefix=prefix,
            host=host,
            port=port,
            requires_key=not no_auth,
            cors_origins=tuple(cors_origin or ()),
            max_body_bytes=max_body * MIB,
            max_open_streams=max_streams,
            max_request_s=max_request_s,
            default_max_tokens=max_tokens,
            grace_s=grace_s,
            files_dir=files_dir,
            max_file_bytes=max_file * MIB,
            max_storage_bytes=max_storage * MIB,
            max_batches=max_batches,
        )
        server = make_server(settings)
        listener = listen(settings)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    _tell(settings, listener)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _asked_to_stop)
    spare_started()
    with listener:
        server.run(sockets=[listener])
    if not server.started:
        raise typer.Exit(1)


def _tell(settings: Settings, listener: socket.socket) -> None:
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    typer.echo(f"serving http://{shown}:{listener.getsockname()[1]}/v1", err=True)
    if settings.requires_key and not is_loopback(settings.host):
        log.info("keys and prompts travel in the open: put a proxy that speaks TLS in front")


def _asked_to_stop(number: int, frame: FrameType | None) -> None:
    """Do nothing: the server has handlers of its own while it runs, and passes the signal on when it has stopped."""


def make_server(settings: Settings) -> uvicorn.Server:
    """Return a server of the application that does not run yet."""
    config = uvicorn.Config(
        make_app(settings),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=KEEP_IDLE_S,
        timeout_graceful_shutdown=max(1, round(settings.grace_s)),
    )
    return uvicorn.Server(config)


def listen(settings: Settings) -> socket.socket:
    """Return the listening socket; raises ConfigError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host.strip("[]"), settings.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; "
            "give another --host or --port"
        ) from error
    return listener
