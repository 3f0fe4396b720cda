"""Says whether this worker is alive and getting on, by what it wrote into Redis; for container health checks.

Owns the judgement only; `heartbeat` writes what is read here. Asks no Celery: a worker can answer ping while it
consumes nothing. Loads no engine, so that a check costs little.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import cast

import redis
from pydantic import ValidationError
from redis.exceptions import RedisError

from lamella.keys import WORKER_TTL_S, Keys
from lamella.messages import WorkerInfo
from lamella.server_errors import tls_trouble
from lamella_worker.config import RedisTable
from lamella_worker.registry import open_redis

WORKERS_LISTED = 1000


@dataclass(frozen=True)
class Health:
    """The verdict and its reason, in one line."""

    is_healthy: bool
    reason: str


def check_health(client: redis.Redis, keys: Keys, name: str | None, longest_sweep_s: float) -> Health:
    """Judge the worker of that name, or all live workers of this host where `name` is None."""
    try:
        infos = _read_infos(client, keys, name)
    except RedisError as error:
        return Health(False, f"Redis does not answer: {tls_trouble(error) or f'{type(error).__name__}: {error}'}")
    except ValidationError:
        return Health(False, "the heartbeat is of another version than this program")
    if name is None:
        host = socket.gethostname()
        infos = [info for info in infos if info.host == host]
        if not infos:
            return Health(False, f"no live worker on host {host}")
    elif not infos:
        return Health(False, f"no heartbeat of worker {name} in the last {WORKER_TTL_S} s")
    for info in infos:
        if (complaint := _complaint(info, longest_sweep_s)) is not None:
            return Health(False, f"worker {info.name}: {complaint}")
    return Health(True, ", ".join(_praise(info) for info in infos))


def _praise(info: WorkerInfo) -> str:
    said = f"worker {info.name}: {info.running} of {info.slots} slots busy"
    process = info.engine_process
    if process is None or (process.state == "ready" and not process.restarts):
        return said
    which = f"engine process {process.pid}" if process.pid is not None else "no engine process now"
    return f"{said} ({which}, {process.state}, restarted {process.restarts} times, last because: {process.trouble})"


def _complaint(info: WorkerInfo, longest_sweep_s: float) -> str | None:
    """What is wrong with a worker that lives: the server forgets the heartbeat of one that does not.

    Times are held against each other and not against this process's clock, which may be another host's.
    """
    process = info.engine_process
    if process is not None and process.state == "failed":
        return f"its engine process is not started again: {process.trouble}"
    if info.running > 0 and info.last_sweep_at is not None:
        quiet_s = info.heartbeat_at - info.last_sweep_at
        if quiet_s > longest_sweep_s:
            return f"{info.running} jobs run, but the last sweep ended {quiet_s:.0f} s before its last heartbeat"
    return None


def _read_infos(client: redis.Redis, keys: Keys, name: str | None) -> list[WorkerInfo]:
    names = [name] if name is not None else cast(list[str], client.zrange(keys.workers, 0, WORKERS_LISTED - 1))
    if not names:
        return []
    raw = cast(list[str | None], client.mget([keys.worker(each) for each in names]))
    return [WorkerInfo.model_validate_json(text) for text in raw if text is not None]


def check_worker(table: RedisTable, name: str | None, longest_sweep_s: float, timeout_s: float) -> Health:
    """Connect, judge, disconnect; every answer is waited for at most `timeout_s` seconds."""
    client = open_redis(table.url.get_secret_value(), timeout_s)
    try:
        return check_health(client, Keys(table.prefix), name, longest_sweep_s)
    finally:
        client.close()
