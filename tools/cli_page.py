"""Writes docs/cli.md: every command with its arguments and options, read from the commands themselves.

Owns the page's form; what it says are the help texts. A test holds the page against the commands, so run
``python -m tools.cli_page`` after changing one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from enum import Enum
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Protocol

import typer.main

from lamella.cli import fleet_models
from lamella.cli.app import app
from lamella.cli.plugins import GROUP

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cli.md"

HEAD = """# The command line

Written by `python -m tools.cli_page` from the commands themselves. What was asked for goes to stdout; progress, figures
and errors go to stderr, an error as one message that says what, why and what to do. Every command that prints data has
`--json`. Bars and live lines are drawn on terminals only.

| exit code | means |
|---|---|
| 0 | done |
| 1 | failed: the server, a worker, a job, a file; the message says which |
| 2 | used wrongly: an unknown option, a value that cannot be, an output that belongs to something else |
| 3 | `lamella batch run`: done, but some lines have errors, which are in the error file |
| 128 + N | ended by signal N: `batch run` stopped by Ctrl-C or SIGTERM is 130, and the same command goes on |

The option `--install-completion` teaches the shell to complete commands and options, ids of the newest jobs and models
that are served; it asks the service for at most a second, and completes nothing where that does not answer.

The server is `--redis-url`, else `LAMELLA_REDIS_URL`, else the running `lamella up`, else `redis://127.0.0.1:6379/0`; a
password comes from the environment or a file ([security](security.md)), never from an option.
"""


class Command(Protocol):
    """What is read of a command; typer brings its own kind of click, so this says only what both have."""

    help: str | None
    params: list[Any]


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page as it has to be."""
    return "\n".join([HEAD, *(_section(name, command) for name, command in all_commands())])


def all_commands() -> Iterator[tuple[str, Any]]:
    """Yield every command with its name: the client's own in the order of the help, then those of other packages."""
    brought = brought_commands()
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        if name not in brought:
            yield from _with_children(f"lamella {name}", command)
    for name, point in sorted(brought.items()):
        yield from _with_children(f"lamella {name}", typer.main.get_command(point.load()))
        if name == "models":  # those of the whole service, which the client takes before the engine is loaded
            fleet: Any = typer.main.get_command(fleet_models.app)
            yield "lamella models pull --on", fleet.commands["pull"]
            yield "lamella models where", fleet.commands["where"]


def brought_commands() -> dict[str, EntryPoint]:
    """Return the commands that other packages bring, as the project names them, whatever is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {name: EntryPoint(name, value, GROUP) for name, value in project["entry-points"][GROUP].items()}


def _with_children(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    children: dict[str, Any] = getattr(command, "commands", {})
    if not children or getattr(command, "invoke_without_command", False):
        yield name, command
    for child, each in children.items():
        yield from _with_children(f"{name} {child}", each)


def _section(name: str, command: Command) -> str:
    shown = [param for param in command.params if not getattr(param, "hidden", False)]
    arguments = [param for param in shown if param.param_type_name == "argument"]
    options = [param for param in shown if param.param_type_name == "option"]
    usage = " ".join([name, *map(_argument, arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## {name}", "", "```text", usage, "```", "", _paragraphs(command.help), ""]
    if shown:
        lines += ["| argument or option | what |", "|---|---|"]
        lines += [f"| {_names(param)} | {_told(param)} |" for param in (*arguments, *options)]
        lines.append("")
    return "\n".join(lines)


def _argument(param: Any) -> str:
    name = str(param.metavar or param.name.upper()).strip("{}[]")
    return name if param.required else f"[{name}]"


def _names(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{_argument(param)}`"
    return ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))


def _told(param: Any) -> str:
    text = " ".join(str(getattr(param, "help", None) or "").split())
    if getattr(param, "multiple", False) and "epeatable" not in text:
        text += " Repeatable."
    if param.param_type_name == "option" and param.required:
        text += " Required."
    kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    if isinstance(kind, type) and issubclass(kind, Enum):
        text += " One of " + ", ".join(f"`{choice.value}`" for choice in kind) + "."
    default = param.default
    is_plain = isinstance(default, int | float | str) and not isinstance(default, bool) and default != ""
    if is_plain and not param.required and "efault" not in text:
        text += f" Default: `{default}`."
    return text.strip().replace("|", "\\|")


def _paragraphs(text: str | None) -> str:
    parts = (text or "").replace("\f", "\n\n").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts if part.strip())


if __name__ == "__main__":
    main()
