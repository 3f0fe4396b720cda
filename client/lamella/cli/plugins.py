"""Commands that other packages bring, found by the entry-point group ``lamella.commands``.

Each is loaded only when it is called, so that a command that needs torch costs the others nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

import typer

from lamella.cli import fleet_models

GROUP = "lamella.commands"
DEFAULT_EXTRA = "worker"
_EXTRAS = {"serve": "server", "keys": "server"}
_HELP = {
    "worker": "Run a worker: serve one model from one device.",
    "models": "Models of this host's store, and where a service has them: list, pull, share, where, ...",
    "serve": "Serve the OpenAI API over HTTP in front of the queue.",
    "keys": "Make, list and revoke API keys of the HTTP gateway, and tell what they used.",
    "metrics": "Serve the metrics of all workers together, for Prometheus.",
    "quality": "Measure what packing a model costs: perplexity, divergence and agreement.",
    "bench": "Measure how fast a model runs here, beside the limit of this machine.",
    "plan": "Show where a model's layers would live within given budgets, and how fast it would run.",
}


def add_commands(app: typer.Typer) -> None:
    """Add a command for every entry point of the group."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        app.command(
            point.name,
            help=_HELP.get(point.name, f"Command of {point.value.partition('.')[0]}."),
            context_settings={
                "allow_extra_args": True,
                "ignore_unknown_options": True,
                "allow_interspersed_args": False,
                "help_option_names": [],
            },
        )(_forwarder(point))


def _forwarder(point: EntryPoint) -> Callable[[typer.Context], None]:
    def forward(context: typer.Context) -> None:
        if point.name == "models" and fleet_models.is_asked(context.args):
            fleet_models.app(args=list(context.args), prog_name=f"lamella {point.name}")
            return
        try:
            command = point.load()
        except ImportError as error:
            typer.echo(
                f"error: `lamella {point.name}` needs packages that are not installed ({error}); "
                f'run `pip install "lamella[{_EXTRAS.get(point.name, DEFAULT_EXTRA)}]"`',
                err=True,
            )
            raise typer.Exit(1) from error
        command(args=list(context.args), prog_name=f"lamella {point.name}")

    return forward
