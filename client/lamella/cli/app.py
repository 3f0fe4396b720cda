"""The command tree, and the edge where errors become one message and an exit code."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lamella import __version__
from lamella.cli import access, batch, chat, doctor, jobs, limits, plugins, top, up
from lamella.errors import ConfigError, DeadlineHopeless, IdempotencyConflict, LamellaError, NoWorkerError, RequestError

EXIT_FAILED = 1
EXIT_USAGE = 2


class ErrorGroup(TyperGroup):
    """A command group that prints an error as one message on stderr; no stack trace reaches the user."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except LamellaError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(exit_code(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            typer.echo(f"error: {error}; check the path, its permissions and the free disk space", err=True)
            raise typer.Exit(EXIT_FAILED) from error


def exit_code(error: LamellaError) -> int:
    """Return 2 if the call itself was wrong, else 1."""
    if isinstance(error, NoWorkerError | IdempotencyConflict | DeadlineHopeless):
        return EXIT_FAILED
    return EXIT_USAGE if isinstance(error, RequestError | ConfigError) else EXIT_FAILED


app = typer.Typer(
    name="lamella",
    cls=ErrorGroup,
    help="Serve and use language models far bigger than the GPUs at hand.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"lamella {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Serve and use language models far bigger than the GPUs at hand."""


app.command("up")(up.up)
app.command("chat")(chat.chat)
app.add_typer(batch.batch, name="batch")
app.command("submit")(jobs.submit)
app.command("stream")(jobs.stream)
app.command("status")(jobs.status)
app.command("cancel")(jobs.cancel)
app.add_typer(jobs.jobs, name="jobs")
app.command("limits")(limits.limits)
app.command("workers")(jobs.workers)
app.command("top")(top.top)
app.command("doctor")(doctor.doctor)
app.command("acl")(access.acl)
app.command("key")(access.key)
plugins.add_commands(app)
