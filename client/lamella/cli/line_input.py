"""Reads what the user types: one line, or several; with editing, history and completion where readline is there.

Owns the prompt, the two ways to write several lines (a line that ends with a backslash goes on; a line of three quotes
opens a text that the next such line closes) and the file of earlier input. Neighbours: `dialogue`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

HISTORY_LINES = 1000
PROMPT, MORE = "> ", ". "
QUOTES = '"""'
MAX_INPUT_CHARS = 4_000_000


def read_input() -> str:
    """Return the next input; raises EOFError at its end and KeyboardInterrupt for Ctrl-C."""
    line = _line(PROMPT)
    if line.strip().startswith(QUOTES):
        return _quoted(line.strip().removeprefix(QUOTES))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(_line(MORE))
    return "\n".join(lines)


def _quoted(first: str) -> str:
    if len(first) >= len(QUOTES) and first.endswith(QUOTES):
        return first.removesuffix(QUOTES)
    lines = [first] if first else []
    size = 0
    while size <= MAX_INPUT_CHARS:
        line = _line(MORE)
        if line.rstrip().endswith(QUOTES):
            last = line.rstrip().removesuffix(QUOTES)
            return "\n".join([*lines, last] if last else lines)
        lines.append(line)
        size += len(line)
    return "\n".join(lines)


def _line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    typer.echo(prompt, err=True, nl=False)  # stdout is the answers' alone
    return input()


@contextmanager
def line_editing(history: Path | None, words: Sequence[str]) -> Generator[None, None, None]:
    """Give input its line editing, the completion of `words`, and a history in a file (None: none is kept)."""
    with suppress(ImportError):
        readline = importlib.import_module("readline")

        def complete(text: str, state: int) -> str | None:
            found = [word for word in words if word.startswith(text)] if text.startswith("/") else []
            return found[state] if state < len(found) else None

        delimiters, completer = readline.get_completer_delims(), readline.get_completer()
        readline.set_completer_delims(" \t\n")
        readline.set_completer(complete)
        is_editline = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if is_editline else "tab: complete")
        readline.clear_history()
        if history is not None:
            with suppress(OSError):
                readline.read_history_file(str(history))
        try:
            yield
        finally:
            readline.set_completer(completer)
            readline.set_completer_delims(delimiters)
            if history is not None:
                _write_history(readline.write_history_file, readline.set_history_length, history)
        return
    yield


def _write_history(write: object, limit: object, history: Path) -> None:
    if not callable(write) or not callable(limit):
        return
    try:
        history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(history, os.O_WRONLY | os.O_CREAT, 0o600))
        limit(HISTORY_LINES)
        write(str(history))
    except OSError as error:
        typer.echo(f"the history could not be written: {error}", err=True)
