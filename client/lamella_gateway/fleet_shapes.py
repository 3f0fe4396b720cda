"""What ``/lamella/*`` answers: an account, workers, queues, jobs, as the registry tells them; no word of what jobs say.

Owns the names and units of the fields. Neighbours: `fleet_routes`, `job_routes` (ask), `openapi` (describes them).
"""

from __future__ import annotations

import time
from typing import Literal

from typing_extensions import TypedDict

from lamella import Done, Failed, JobStatus, WorkerInfo
from lamella.registry_calls import ATTEMPTS_EXHAUSTED
from lamella.worker_state import WorkerState, worker_state


class AccountBody(TypedDict):
    """Who asks; `user` and `key` are null where the gateway asks for no key."""

    object: Literal["account"]
    user: str | None
    key: str | None
    is_admin: bool
    sees_jobs: bool
    version: str


class TierBytes(TypedDict):
    """Bytes of weights by where they wait for a sweep."""

    vram: int
    ram: int
    disk: int


class ServedModelBody(TypedDict):
    """A model as one worker serves it."""

    name: str
    family: str
    dtype: str
    num_layers: int
    context_length: int
    size_bytes: int
    slots: int
    running: int


class EngineBody(TypedDict):
    """The process that a worker's engine has of its own."""

    state: Literal["starting", "ready", "failed"]
    restarts: int
    max_sequences: int
    trouble: str | None


class WorkerBody(TypedDict):
    """A live worker; counters since its start. `plan` is what one sweep uses from each tier, null before the first."""

    object: Literal["worker"]
    name: str
    host: str
    device: str
    version: str
    state: WorkerState
    models: list[ServedModelBody]
    slots: int
    running: int
    started_at: float
    heartbeat_at: float
    last_sweep_at: float | None
    sweeps: int
    tokens: int
    streamed_bytes: int
    peak_rss_bytes: int
    plan: TierBytes | None
    engine: EngineBody | None


class WorkersBody(TypedDict):
    """The live workers; `at` is the gateway's clock."""

    object: Literal["list"]
    at: float
    data: list[WorkerBody]


class QueueBody(TypedDict):
    """One model's queue; `oldest_s` is the age of the job that has waited longest, null if none waits."""

    object: Literal["queue"]
    model: str
    workers: int
    slots: int
    waiting: int
    in_flight: int
    oldest_s: float | None


class QueuesBody(TypedDict):
    """The queues of all models that are served or waited for."""

    object: Literal["list"]
    at: float
    data: list[QueueBody]


class JobErrorBody(TypedDict):
    """Why a job failed."""

    code: str
    message: str


class JobBody(TypedDict):
    """A job, without its prompt and answer; position and estimates are told of single jobs that have not ended."""

    object: Literal["job"]
    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    model: str
    user: str | None
    priority: Literal["high", "normal", "low"]
    worker: str | None
    attempts: int
    events: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    deadline_at: float | None
    cancel_requested: bool
    can_retry: bool
    position: int | None
    estimated_start_at: float | None
    estimated_end_at: float | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    sweeps: int | None
    run_s: float | None
    error: JobErrorBody | None


class JobsBody(TypedDict):
    """Jobs, newest first; `at` is the gateway's clock."""

    object: Literal["list"]
    at: float
    data: list[JobBody]


def worker_body(worker: WorkerInfo, now: float) -> WorkerBody:
    """Return a worker as it is shown."""
    process = worker.engine_process
    return WorkerBody(
        object="worker",
        name=worker.name,
        host=worker.host,
        device=worker.device,
        version=worker.version,
        state=worker_state(worker, now),
        models=[
            ServedModelBody(
                name=model.name,
                family=model.family,
                dtype=model.dtype,
                num_layers=model.num_layers,
                context_length=model.context_length,
                size_bytes=model.size_bytes,
                slots=model.slots,
                running=model.running,
            )
            for model in worker.served
        ],
        slots=worker.slots,
        running=worker.running,
        started_at=worker.started_at,
        heartbeat_at=worker.heartbeat_at,
        last_sweep_at=worker.last_sweep_at,
        sweeps=worker.sweeps,
        tokens=worker.tokens,
        streamed_bytes=worker.streamed_bytes,
        peak_rss_bytes=worker.peak_rss_bytes,
        plan=_plan(worker),
        engine=None
        if process is None
        else EngineBody(
            state=process.state,
            restarts=process.restarts,
            max_sequences=process.max_sequences,
            trouble=process.trouble,
        ),
    )


def job_body(job: JobStatus) -> JobBody:
    """Return a job as it is shown."""
    outcome = job.outcome
    usage = outcome.usage if isinstance(outcome, Done) else None
    failure = outcome if isinstance(outcome, Failed) else None
    return JobBody(
        object="job",
        id=job.job_id,
        state=job.state.value,
        model=job.model,
        user=job.user,
        priority=job.priority.value,
        worker=job.worker,
        attempts=job.attempts,
        events=job.events,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        deadline_at=job.deadline_at,
        cancel_requested=job.cancel_requested,
        can_retry=failure is not None and failure.code == ATTEMPTS_EXHAUSTED,
        position=job.position,
        estimated_start_at=job.estimated_start_at,
        estimated_end_at=job.estimated_end_at,
        finish_reason=outcome.finish_reason if isinstance(outcome, Done) else None,
        prompt_tokens=None if usage is None else usage.prompt_tokens,
        completion_tokens=None if usage is None else usage.completion_tokens,
        sweeps=None if usage is None else usage.sweeps,
        run_s=None if usage is None else usage.run_s,
        error=None if failure is None else JobErrorBody(code=failure.code, message=failure.message),
    )


def _plan(worker: WorkerInfo) -> TierBytes | None:
    """Return the bytes of one sweep by tier: each sweep passes every layer, so it is where the layers live."""
    if worker.tier_bytes is None or worker.sweeps == 0:
        return None
    disk, ram, vram = (round(total / worker.sweeps) for total in worker.tier_bytes)
    return TierBytes(vram=vram, ram=ram, disk=disk)


def clock() -> float:
    """Return the gateway's time in Unix seconds, to the millisecond."""
    return round(time.time(), 3)
