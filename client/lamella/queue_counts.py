"""How many jobs wait and are in flight for each model, and since when the oldest waits: read, never kept.

Does no I/O (see `steps`). Neighbours: `keys`; ``lamella top`` and the gateway, which show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lamella.keys import Keys
from lamella.messages import JobState
from lamella.steps import Operation, answers, commands

OLDEST_LOOKED_AT = 200  # of the jobs that have not ended, for the age of queues


class QueueCounts(NamedTuple):
    """Jobs of one model that wait, and those that were sent to its workers and have not ended."""

    waiting: int
    in_flight: int


def oldest_waiting(keys: Keys) -> Operation[dict[str, float]]:
    """Return when the job that has waited longest was accepted (Unix seconds), by model."""
    raw = yield commands(("ZRANGE", keys.active, 0, OLDEST_LOOKED_AT - 1))
    ids = [str(job_id) for job_id in answers(answers(raw)[0])]
    if not ids:
        return {}
    records = yield commands(*(("HMGET", keys.job(job_id), "state", "model", "created_at") for job_id in ids))
    found: dict[str, float] = {}
    for record in answers(records):
        state, model, created_at = answers(record)
        if state == JobState.QUEUED.value and model is not None and str(created_at).isdecimal():
            found.setdefault(str(model), int(str(created_at)) / 1000)
    return found


def queue_counts(keys: Keys, models: Sequence[str]) -> Operation[dict[str, QueueCounts]]:
    """Return how many jobs wait and are in flight, by model."""
    if not models:
        return {}
    asked = [(("HMGET", keys.queue(model), "n0", "n1", "n2"), ("ZCARD", keys.flight(model))) for model in models]
    raw = answers((yield commands(*(command for pair in asked for command in pair))))
    return {
        model: QueueCounts(
            sum(int(str(count)) for count in answers(raw[2 * at]) if count is not None), int(str(raw[2 * at + 1]))
        )
        for at, model in enumerate(models)
    }
