"""`lamella top`: workers, queues and jobs, live; one frame with --once, an object a look with --json."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from lamella.cli import options
from lamella.cli.top_data import Frame, Watcher
from lamella.cli.top_view import draw
from lamella.client import Client
from lamella.errors import ServerError
from lamella.server_url import public_url, resolve_url

KEYS = "q quits"
ASK_S = 3.0  # deadline of one question
_SEQUENCE = re.compile(rb"\x1b(?:\[[0-9;?]*[@-~]|O.|.)?", re.DOTALL)  # of a key such as an arrow
RATE_S = 2.5  # above the time between two heartbeats, so that rates can be told


def top(
    interval_s: Annotated[
        float, typer.Option("--interval", "-i", min=0.2, max=3600.0, help="Seconds between two looks.")
    ] = 2.0,
    num_jobs: Annotated[int, typer.Option("--jobs", "-n", min=1, max=200, help="Newest jobs to show.")] = 20,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end; it takes two looks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object for every look, one a line.")] = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Show workers, queues and jobs, live; q or Ctrl-C ends it.

    While the server does not answer, the last that was heard stays, with the reason; one that was never reached is an
    error. Bytes a second are those of weights that sweeps used, by where they waited.
    """
    with Client(redis_url, prefix=prefix, timeout_s=ASK_S) as client:
        watcher = Watcher(client.connection, public_url(resolve_url(redis_url)), num_jobs)
        frame = watcher.look()
        if once:
            time.sleep(RATE_S)
            _print(watcher.look(), as_json=as_json)
        elif as_json or not sys.stdout.isatty():
            _print_on(watcher, frame, interval_s, as_json=as_json)
        else:
            _live(watcher, frame, interval_s)


def _print(frame: Frame, *, as_json: bool) -> None:
    if as_json:
        typer.echo(frame.model_dump_json())
        return
    console = Console(file=sys.stdout)
    console.print(draw(frame))


def _print_on(watcher: Watcher, frame: Frame, interval_s: float, *, as_json: bool) -> None:
    """Print look after look until Ctrl-C; a lost server is told in the object, or above the frame."""
    try:
        while True:
            _print(frame, as_json=as_json)
            time.sleep(interval_s)
            frame = _next(watcher, frame)
    except KeyboardInterrupt:
        return


def _next(watcher: Watcher, before: Frame) -> Frame:
    try:
        return watcher.look()
    except ServerError as error:
        return before.model_copy(update={"error": f"{error}."})


def _live(watcher: Watcher, frame: Frame, interval_s: float) -> None:
    console = Console()
    try:
        with _keys() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(draw(frame, console.size.height, keys=KEYS), refresh=True)
                if _is_quit(keyboard, interval_s):
                    return
                frame = _next(watcher, frame)
    except KeyboardInterrupt:
        return


@contextmanager
def _keys() -> Generator[int | None, None, None]:
    """Yield the descriptor that keys come from, one by one; None where stdin is no terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard)
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _is_quit(keyboard: int | None, wait_s: float) -> bool:
    """Wait for the next look, or for a key; return whether the key ends it."""
    if keyboard is None:
        time.sleep(wait_s)
        return False
    deadline = time.monotonic() + wait_s
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([keyboard], [], [], left)
        if not ready:
            return False
        pressed = os.read(keyboard, 32)
        if not pressed:
            return True
        typed = _SEQUENCE.sub(b"", pressed)
        if any(key in typed for key in b"qQ\x04"):
            return True
        if b" " in typed:
            return False
    return False
