"""What a worker is doing, in one word, by its heartbeat.

Owns the rule for those who show it: `cli.top_data` and the gateway's page. `lamella doctor` has a limit of its own,
because it gives advice.
"""

from __future__ import annotations

from typing import Literal

from lamella.messages import WorkerInfo

STUCK_S = 60.0  # without a sweep while jobs run

WorkerState = Literal["busy", "idle", "draining", "stuck", "starting", "failed"]


def worker_state(worker: WorkerInfo, now: float) -> WorkerState:
    """The state of a worker at `now`, in Unix seconds; stuck is one with jobs and no sweep for a minute."""
    process = worker.engine_process
    if worker.draining:
        return "draining"
    if process is not None and process.state != "ready":
        return process.state
    if worker.running == 0:
        return "idle"
    is_stuck = worker.last_sweep_at is not None and now - worker.last_sweep_at > STUCK_S
    return "stuck" if is_stuck else "busy"
