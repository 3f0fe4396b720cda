"""What `lamella top` shows, as figures: workers, models, queues and jobs, and how fast things go between two looks.

Owns the questions to the registry and the arithmetic; draws nothing. Neighbours: `top_view` (draws it), `top`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from lamella import operations
from lamella.connection import Connection
from lamella.messages import JobState, JobStatus, WorkerInfo
from lamella.queue_counts import oldest_waiting, queue_counts
from lamella.worker_state import worker_state

MODELS_SHOWN = 50


class WorkerRow(BaseModel):
    """One worker; rates are of the time between two heartbeats, None where nothing moved or only one was seen."""

    name: str
    host: str
    device: str
    models: list[str]
    state: str
    running: int
    slots: int
    tokens_per_s: float | None = None
    sweep_s: float | None = None
    disk_bytes_per_s: float | None = None
    ram_bytes_per_s: float | None = None
    vram_bytes_per_s: float | None = None
    peak_memory_bytes: int = 0


class QueueRow(BaseModel):
    """One model's queue; `oldest_s` is the age of the job that has waited longest, of those looked at."""

    model: str
    workers: int
    slots: int
    waiting: int
    in_flight: int
    oldest_s: float | None = None
    tokens_per_s: float | None = None


class JobRow(BaseModel):
    """One of the newest jobs."""

    job_id: str
    state: str
    model: str
    user: str | None
    worker: str | None
    events: int
    age_s: float


class Frame(BaseModel):
    """One look; `error` says why there is nothing newer."""

    at: float
    server: str
    error: str | None = None
    workers: list[WorkerRow] = []
    queues: list[QueueRow] = []
    jobs: list[JobRow] = []


@dataclass(frozen=True)
class _Rates:
    tokens_per_s: float | None = None
    sweep_s: float | None = None
    tier_bytes_per_s: tuple[float | None, float | None, float | None] = (None, None, None)


class Watcher:
    """Asks the registry, and remembers the heartbeats before; changed only by `look`."""

    def __init__(self, connection: Connection, server: str, num_jobs: int) -> None:
        self._connection = connection
        self._server = server
        self._num_jobs = num_jobs
        self._before: dict[str, WorkerInfo] = {}
        self._rates: dict[str, _Rates] = {}

    def look(self) -> Frame:
        """Return how things stand; raises ServerError."""
        keys, run = self._connection.keys, self._connection.run
        workers = run(operations.workers(keys))
        jobs = run(operations.jobs(keys, self._num_jobs))
        for worker in workers:
            self._note(worker)
        live = {worker.name for worker in workers}
        self._before = {name: info for name, info in self._before.items() if name in live}
        self._rates = {name: rates for name, rates in self._rates.items() if name in live}
        now = time.time()
        oldest = run(oldest_waiting(keys))
        models = {model.name for worker in workers for model in worker.served}
        models |= {job.model for job in jobs if not job.state.is_final} | set(oldest)
        queues = run(queue_counts(keys, sorted(models)[:MODELS_SHOWN]))
        return Frame(
            at=now,
            server=self._server,
            workers=[self._worker_row(worker, now) for worker in workers],
            queues=[self._queue_row(name, queues[name], workers, oldest.get(name), now) for name in queues],
            jobs=[_job_row(job, now) for job in sorted(jobs, key=_turn)],
        )

    def _note(self, worker: WorkerInfo) -> None:
        before = self._before.get(worker.name)
        self._before[worker.name] = worker
        if before is None or before.started_at != worker.started_at:
            self._rates.pop(worker.name, None)
            return
        seconds = worker.heartbeat_at - before.heartbeat_at
        if seconds <= 0:
            return  # the same heartbeat: what it told still holds
        sweeps = worker.sweeps - before.sweeps
        self._rates[worker.name] = _Rates(
            tokens_per_s=(worker.tokens - before.tokens) / seconds,
            sweep_s=seconds / sweeps if sweeps > 0 else None,
            tier_bytes_per_s=_tier_rates(worker, before, seconds),
        )

    def _worker_row(self, worker: WorkerInfo, now: float) -> WorkerRow:
        rates = self._rates.get(worker.name, _Rates())
        return WorkerRow(
            name=worker.name,
            host=worker.host,
            device=worker.device,
            models=[model.name for model in worker.served],
            state=_state(worker, now),
            running=worker.running,
            slots=worker.slots,
            tokens_per_s=rates.tokens_per_s,
            sweep_s=rates.sweep_s,
            disk_bytes_per_s=rates.tier_bytes_per_s[0],
            ram_bytes_per_s=rates.tier_bytes_per_s[1],
            vram_bytes_per_s=rates.tier_bytes_per_s[2],
            peak_memory_bytes=worker.peak_rss_bytes,
        )

    def _queue_row(
        self, model: str, counts: tuple[int, int], workers: Sequence[WorkerInfo], oldest_at: float | None, now: float
    ) -> QueueRow:
        live = [worker for worker in workers if any(each.name == model for each in worker.served)]
        alone = [worker for worker in live if len(worker.served) == 1]  # of others the tokens are of all their models
        rates = [self._rates[worker.name].tokens_per_s for worker in alone if worker.name in self._rates]
        return QueueRow(
            model=model,
            workers=len(live),
            slots=sum(
                each.slots for worker in live if not worker.draining for each in worker.served if each.name == model
            ),
            waiting=counts[0],
            in_flight=counts[1],
            oldest_s=None if oldest_at is None else max(0.0, now - oldest_at),
            tokens_per_s=sum(rate or 0.0 for rate in rates) if rates else None,
        )


def _tier_rates(
    worker: WorkerInfo, before: WorkerInfo, seconds: float
) -> tuple[float | None, float | None, float | None]:
    if worker.tier_bytes is None or before.tier_bytes is None:
        return None, None, None
    disk, ram, vram = ((now - then) / seconds for now, then in zip(worker.tier_bytes, before.tier_bytes, strict=True))
    return disk, ram, vram


def _state(worker: WorkerInfo, now: float) -> str:
    state = worker_state(worker, now)
    if state == "stuck" and worker.last_sweep_at is not None:
        return f"no sweep for {now - worker.last_sweep_at:.0f} s"
    return state


def _turn(job: JobStatus) -> int:
    """Put what runs before what waits, and that before what has ended."""
    return (JobState.RUNNING, JobState.QUEUED, job.state).index(job.state)


def _job_row(job: JobStatus, now: float) -> JobRow:
    return JobRow(
        job_id=job.job_id,
        state=job.state.value,
        model=job.model,
        user=job.user,
        worker=job.worker,
        events=job.events,
        age_s=max(0.0, now - job.created_at),
    )
