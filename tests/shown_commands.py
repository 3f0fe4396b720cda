"""Parses `lamella` commands that files of this repository show, exactly as the program would, without running them."""

from __future__ import annotations

import contextlib
import shlex
from importlib.metadata import entry_points
from typing import Any

import click
import typer.main

from lamella.cli.app import app as lamella_app


def parse(words: list[str]) -> dict[str, Any]:
    """Return what the last command of the words after ``lamella`` was told; raises click's errors for what is wrong."""
    for point in entry_points(group="lamella.commands"):
        if words and words[0] == point.name:
            return _parse(typer.main.get_command(point.load()), words[1:], None)
    return _parse(typer.main.get_command(lamella_app), words, None)


def parse_line(line: str) -> None:
    """Parse a shell line that starts with ``lamella``; ``--help`` and its like are understood."""
    words = shlex.split(line, comments=True)
    for stop in ("|", ">", ">>", "<", "&", "&&", "||", ";"):
        if stop in words:
            words = words[: words.index(stop)]
    with contextlib.suppress(typer.Exit, click.exceptions.Exit):
        parse(words[1:])


def _parse(command: click.Command, words: list[str], parent: click.Context | None) -> dict[str, Any]:
    context = command.make_context(command.name, list(words), parent=parent)
    rest = [*context._protected_args, *context.args] if isinstance(command, click.Group) else []
    if isinstance(command, click.Group) and rest:
        _, sub, left = command.resolve_command(context, rest)
        assert sub is not None
        return _parse(sub, left, context)
    told: dict[str, Any] = context.params
    return told
