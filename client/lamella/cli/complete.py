"""What the shell completes besides options: job ids, models and workers, asked of the registry.

Owns the short deadline of these questions and that they never print: where the server does not answer, nothing is
completed. Neighbours: `options` (which arguments are completed), typer's ``--install-completion``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import typer

from lamella.client import Client
from lamella.errors import LamellaError
from lamella.keys import DEFAULT_PREFIX

DEADLINE_S = 1.0
JOBS_OFFERED = 100

Names = list[tuple[str, str]]


def complete_job(ctx: typer.Context, incomplete: str) -> Names:
    """Offer the newest jobs, with what they are."""
    return _ask(
        ctx,
        incomplete,
        lambda client: ((job.job_id, f"{job.state.value}, {job.model}") for job in client.jobs(JOBS_OFFERED)),
    )


def complete_model(ctx: typer.Context, incomplete: str) -> Names:
    """Offer the models that live workers serve."""
    return _ask(ctx, incomplete, lambda client: ((model.name, model.family) for model in client.models()))


def complete_worker(ctx: typer.Context, incomplete: str) -> Names:
    """Offer the live workers."""
    return _ask(ctx, incomplete, lambda client: ((each.name, each.device) for each in client.workers()))


def _ask(ctx: typer.Context, incomplete: str, names: Callable[[Client], Iterable[tuple[str, str]]]) -> Names:
    logging.getLogger("lamella").setLevel(logging.CRITICAL)  # the shell would take a warning for a name
    given = ctx.params
    try:
        with Client(
            given.get("redis_url"), prefix=given.get("prefix") or DEFAULT_PREFIX, timeout_s=DEADLINE_S
        ) as client:
            return [(name, told) for name, told in names(client) if name.startswith(incomplete)]
    except LamellaError:
        return []
