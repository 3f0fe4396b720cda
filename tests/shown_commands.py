"""Parses `lamella` commands that files of this repository show, exactly as the program would, without running them."""

from __future__ import annotations

import importlib.util
import shlex
from importlib.metadata import entry_points
from typing import Any

import typer
import typer.main
from typer.core import TyperGroup

from lamella.cli.app import app as lamella_app

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # of whichever click typer uses
_SHELL = ("|", ">", ">>", "<", "&", "&&", "||", ";")


def words_of(line: str) -> list[str]:
    """Split a shell line that starts with ``lamella`` into the words after it, up to the first pipe or the like."""
    words = shlex.split(line, comments=True)[1:]
    ends = [words.index(mark) for mark in _SHELL if mark in words]
    return words[: min(ends)] if ends else words


def parse(words: list[str]) -> dict[str, Any]:
    """Return what the last command of the words after ``lamella`` was told.

    Raises what the command raises for an unknown option, a missing argument or a value that cannot be used.
    """
    if words[:1] == ["models"] and importlib.util.find_spec("lamella.cli.fleet_models") is not None:
        fleet = importlib.import_module("lamella.cli.fleet_models")
        if fleet.is_asked(words[1:]):
            return _parse(typer.main.get_command(fleet.app), words[1:], None)
    for point in entry_points(group="lamella.commands"):
        if words and words[0] == point.name:
            return _parse(typer.main.get_command(point.load()), words[1:], None)
    return _parse(typer.main.get_command(lamella_app), words, None)


def complaint_of(line: str) -> str | None:
    """What the command would say against a shell line; None where it is understood, ``--help`` included."""
    try:
        parse(words_of(line))
    except typer.Exit:
        return None
    except USAGE_ERROR as error:
        return f"{line}: {getattr(error, 'message', error)}"
    return None


def _parse(command: Any, words: list[str], parent: Any) -> dict[str, Any]:
    # typer brings a click of its own, so that its groups are no click.Group of the package of that name.
    context = command.make_context(command.name, list(words), parent=parent)
    rest = [*context._protected_args, *context.args] if isinstance(command, TyperGroup) else []
    if rest:
        _, sub, left = command.resolve_command(context, rest)
        assert sub is not None
        return _parse(sub, left, context)
    told: dict[str, Any] = context.params
    return told
