"""The queue at scale: a real server, the product's own scripts and calls, simulated workers, up to a million jobs.

    python -m benchmarks.fleet_sim --jobs 100000 --workers 1000 --users 1000 --out benchmarks/results/FILE.json

Jobs are submitted in steps that double; at each step every operation is probed, so that what grows with
the queue shows.
Then workers claim and end jobs: the rate, how far users are from their shares, and what becomes of the jobs of a tenth
of the workers that fall silent at once. A cost is processor time of the server, which a busy machine disturbs less than
the clock; both are told. What is not simulated: models, the wire's latency, kombu's own bookkeeping of deliveries.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis

from benchmarks.fleet import MAX_ATTEMPTS, MODEL, Fleet, Held, request_of
from benchmarks.json_file import write_json
from benchmarks.machine import Bystanders, machine_facts
from lamella.embedded import EmbeddedServer
from lamella.keys import HEARTBEAT_S
from lamella.queue_calls import expire_call, outlook_call, serve_call, tend_call
from lamella.queue_terms import QueueTerms
from lamella.records import STATUS_FIELDS
from lamella.registry_calls import cancel_call, claim_call, emit_call, nudge_call, release_call, submit_call
from lamella.script_call import ScriptCall
from lamella_worker.reconciler import Reconciler
from lamella_worker.registry import Registry, RegistryAway, RegistryBroken

OTHER = "served-elsewhere"  # so that heartbeats can be probed while nothing may be sent
SUBMIT_BATCH = 500
WORK_BATCH = 32
PROBES = 200
STEPS = 4  # sizes that double up to the whole
TICK_S = 1.0
SLOW_US = 10_000


class Meter:
    """Processor and clock seconds of the server between two looks."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._cpu_s, self._began = self._cpu(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Processor seconds of the server, and seconds by the clock, since the meter was made."""
        return self._cpu() - self._cpu_s, time.perf_counter() - self._began

    def _cpu(self) -> float:
        info: dict[str, float] = self._client.info("cpu")
        return info["used_cpu_user"] + info["used_cpu_sys"]


def submit_all(fleet: Fleet, numbers: range) -> dict[str, Any]:
    """Submit jobs in pipelines; the rate, and the server's share of it."""
    meter = Meter(fleet.client)
    for start in range(numbers.start, numbers.stop, SUBMIT_BATCH):
        fleet.submit(range(start, min(start + SUBMIT_BATCH, numbers.stop)))
    return _rate(len(numbers), *meter.read())


def _rate(count: int, cpu_s: float, clock_s: float) -> dict[str, Any]:
    return {
        "jobs": count,
        "seconds": round(clock_s, 2),
        "per_s": round(count / clock_s),
        "server_cpu_us_each": round(cpu_s / count * 1e6, 1),
        "per_server_cpu_s": round(count / cpu_s),
    }


def probe(fleet: Fleet, label: int) -> dict[str, float]:
    """Server processor time of each operation at the present size, in microseconds; jobs of its own, all removed."""
    keys, ids = fleet.keys, [f"probe-{label}-{number}" for number in range(PROBES)]
    costs: dict[str, float] = {}

    def run(name: str, calls: Sequence[ScriptCall[Any]]) -> list[Any]:
        meter = Meter(fleet.client)
        answers = fleet.registry.call_many(calls)
        costs[name] = round(meter.read()[0] / len(calls) * 1e6, 1)
        for answer in answers:
            if isinstance(answer, RegistryAway | RegistryBroken):
                raise answer
        return answers

    run("submit", [submit_call(keys, each, request_of(0), QueueTerms("prober")) for each in ids])
    run("outlook", [outlook_call(keys, each) for each in ids])
    run("nudge (waiting)", [nudge_call(keys, each, MODEL, 10_000) for each in ids])
    half = PROBES // 2
    run("cancel (waiting)", [cancel_call(keys, each) for each in ids[:half]])
    claims = run("claim", [claim_call(keys, each, "prober", 60_000, MAX_ATTEMPTS) for each in ids[half:]])
    held = [(each, claim.fence) for each, claim in zip(ids[half:], claims, strict=True)]
    run("renew", [emit_call(keys, each, fence, 1, 60_000) for each, fence in held])
    run("release", [release_call(keys, each, fence, give_back_attempt=True) for each, fence in held])
    run("cancel (released)", [cancel_call(keys, each) for each in ids[half:]])
    run("tend", [tend_call(keys, MODEL)] * PROBES)
    run("expire", [expire_call(keys, 100)] * PROBES)
    beats = [serve_call(keys, f"w{number % fleet.num_workers}", OTHER, fleet.slots) for number in range(PROBES)]
    run("serve", beats)
    meter = Meter(fleet.client)
    with fleet.client.pipeline(transaction=False) as pipe:
        for each in ids:
            pipe.hmget(keys.job(each), list(STATUS_FIELDS))
        pipe.execute()
    costs["status"] = round(meter.read()[0] / PROBES * 1e6, 1)
    return costs


def work(fleet: Fleet, most: int, workers: Sequence[int]) -> int:
    """Claim and end jobs until `most` ended, or nothing comes any more; returns how many were ended."""
    ended, beat = 0, time.monotonic()
    while ended < most:
        if time.monotonic() - beat >= HEARTBEAT_S:
            beat = time.monotonic()
            fleet.serve(workers)
        held = fleet.claim(min(WORK_BATCH, most - ended), workers)
        if not held:
            break
        fleet.end(held)
        ended += len(held)
    return ended


def dispatch(fleet: Fleet, most: int, others: Sequence[redis.Redis]) -> dict[str, Any]:
    """Claim, end and thereby send on `most` jobs, on the fleet's connection and `others` at once, as workers do."""
    sides = [fleet, *(fleet.beside(other) for other in others)]
    meter = Meter(fleet.client)
    with ThreadPoolExecutor(len(sides)) as pool:
        turns = [
            pool.submit(work, side, most // len(sides), range(place, fleet.num_workers, len(sides)))
            for place, side in enumerate(sides)
        ]
        ended = sum(turn.result() for turn in turns)
    return {"connections": len(sides), **_rate(ended, *meter.read())}


def fairness(fleet: Fleet) -> dict[str, Any]:
    """How far users are from their shares: tokens by weight, as jobs of a user of weight 1, and as a part."""
    shares = [fleet.book.tokens_by_user[user] / fleet.weight(user) for user in range(fleet.num_users)]
    mean = statistics.fmean(shares)
    job_tokens = 35.0
    return {
        "users": fleet.num_users,
        "weights": [1, 1, 2, 4],
        "jobs_a_user_of_weight_1": round(mean / job_tokens, 2),
        "worst_error_jobs": round(max(abs(each - mean) for each in shares) / job_tokens, 2),
        "mean_error_percent": round(100 * statistics.fmean(abs(each - mean) for each in shares) / mean, 2),
    }


def lose_a_tenth(fleet: Fleet, lease_ms: int, deadline_s: float) -> dict[str, Any]:
    """Fill all slots, let a tenth of the workers fall silent, and see their jobs through with the others.

    The others end what they hold while the real reconciler ticks once a second; at the end the lost workers wake up and
    try to end what they held. Seconds count from the last claim.
    """
    fleet.serve(range(fleet.num_workers))
    lost_workers = range(fleet.num_workers // 10)
    alive = range(fleet.num_workers // 10, fleet.num_workers)
    held: list[Held] = []
    while taken := fleet.claim(200, range(fleet.num_workers), lease_ms, lost_workers):
        held += taken
    lost = {job.number: job for job in held if job.worker in lost_workers}
    began = time.monotonic()
    kept = [job for job in held if job.number not in lost]
    reconciler = Reconciler(fleet.client, Registry(fleet.client, fleet.keys), "w-reconciler", lease_ms / 1000)
    missing = set(lost)
    resumed_s: list[float] = []
    ticked = beat = 0.0
    while missing and time.monotonic() - began < deadline_s:
        now = time.monotonic()
        if now - ticked >= TICK_S:
            ticked = now
            reconciler.tick()
        if now - beat >= HEARTBEAT_S:
            beat = now
            fleet.serve(alive)
        taken = fleet.claim(WORK_BATCH, alive)
        for job in taken:
            if job.number in missing:
                missing.discard(job.number)
                resumed_s.append(time.monotonic() - began)
        fleet.end(taken + kept[:WORK_BATCH])
        kept = kept[WORK_BATCH:]
    before = dict(fleet.book.refused)
    fleet.end(list(lost.values()))
    refused = fleet.book.refused["end fenced"] - before.get("end fenced", 0)
    return {
        "workers_lost": len(lost_workers),
        "jobs_they_held": len(lost),
        "lease_s": lease_ms / 1000,
        "resumed": len(resumed_s),
        "first_resumed_s": round(min(resumed_s, default=0.0), 2),
        "last_resumed_s": round(max(resumed_s, default=0.0), 2),
        "late_ends_refused": refused,
    }


def slowest(client: redis.Redis) -> list[dict[str, Any]]:
    """What the server noted as slow, without the arguments."""
    entries = client.slowlog_get(16)
    return [{"us": entry["duration"], "command": str(entry["command"])[:40]} for entry in entries]


def simulate(options: argparse.Namespace, client: redis.Redis, others: Sequence[redis.Redis]) -> dict[str, Any]:
    """Run every part; returns the figures. `others` are further connections, for dispatching."""
    fleet = Fleet(client, options.workers, options.users, options.jobs, options.slots)
    client.config_set("slowlog-log-slower-than", SLOW_US)
    client.config_set("appendonly", "yes" if options.appendonly else "no")
    client.hset(fleet.keys.limits, "model_queued", str(options.jobs + 10 * PROBES))
    fleet.set_weights()
    fleet.serve(range(options.workers), OTHER)
    empty_bytes = int(client.info("memory")["used_memory"])
    steps, done = [], 0
    for step in range(STEPS - 1, -1, -1):
        size = options.jobs >> step
        told = submit_all(fleet, range(done, size))
        done = size
        waiting_bytes = int(client.info("memory")["used_memory"]) - empty_bytes
        steps.append({"waiting": size, "submit": told, "bytes_a_job": round(waiting_bytes / size)})
        steps[-1]["cpu_us"] = probe(fleet, size)
        _say(f"{size:,} waiting: {told['per_s']}/s submitted, {steps[-1]['bytes_a_job']} bytes a job")
    fleet.serve(range(options.workers))
    sent = int(client.llen(fleet.keys.queue_list(MODEL)))
    peak_bytes = int(client.info("memory")["used_memory"]) - empty_bytes
    rate = dispatch(fleet, min(options.run, options.jobs // 2), others)
    _say(f"dispatch: {rate['per_s']}/s, {rate['per_server_cpu_s']} per second of the server's processor")
    fair = fairness(fleet)
    recovery = lose_a_tenth(fleet, options.lease_ms, 300.0)
    _say(f"recovery: {recovery}")
    left = 0
    if options.drain:
        fleet.serve(range(options.workers // 10, options.workers))
        left = _drain(fleet)
    return {
        "steps": steps,
        "sent_at_once": sent,
        "bytes_a_job_with_messages": round(peak_bytes / options.jobs),
        "dispatch": rate,
        "fairness": fair,
        "recovery": recovery,
        "drained": left,
        "account": _account(fleet, options.jobs),
        "slowlog_over_us": SLOW_US,
        "slowlog": slowest(client),
    }


def _drain(fleet: Fleet) -> int:
    ended = 0
    alive = range(fleet.num_workers // 10, fleet.num_workers)
    while some := work(fleet, 5000, alive):
        ended += some
    return ended


def _account(fleet: Fleet, num_jobs: int) -> dict[str, Any]:
    """Where every job is: nothing may be lost, and nothing may have ended twice."""
    flight = int(fleet.client.zcard(fleet.keys.flight(MODEL)))
    waiting, ended = fleet.waiting(), fleet.book.num_ended
    return {
        "submitted": num_jobs,
        "ended_once": ended - fleet.book.num_doubled,
        "ended_twice": fleet.book.num_doubled,
        "in_flight": flight,
        "waiting": waiting,
        "lost": num_jobs - ended - flight - waiting,
        "refused": dict(fleet.book.refused),
    }


@contextmanager
def _fewer_lines() -> Iterator[None]:
    """Leave out the worker's line about each job that is sent again."""
    logger = logging.getLogger("lamella_worker")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _connect(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, protocol=2, decode_responses=True, socket_timeout=120)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=4, help="of each worker")
    parser.add_argument("--run", type=int, default=50_000, help="jobs that the rate of dispatch is measured with")
    parser.add_argument("--connections", type=int, default=2, help="that dispatch at once; one waits for each answer")
    parser.add_argument("--lease-ms", type=int, default=5000)
    parser.add_argument("--drain", action="store_true", help="run all jobs to their end")
    parser.add_argument("--no-appendonly", dest="appendonly", action="store_false", help="keep no append-only file")
    parser.add_argument("--directory", type=Path, default=None, help="of the server's files; else a temporary one")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; else standard output")
    options = parser.parse_args(arguments)
    if not 1 <= options.connections <= options.workers:
        parser.error("--connections is at least 1, and at most as many as there are workers")
    if options.jobs < 1 << STEPS or not options.workers >= 10 or not 1 <= options.users <= options.jobs:
        parser.error("it takes at least 16 jobs, 10 workers, and no more users than jobs")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulation and write its figures."""
    options = parse(arguments)
    bystanders = Bystanders()
    with tempfile.TemporaryDirectory(prefix="lamella-fleet-", dir=options.directory) as directory:
        root = Path(directory)
        with EmbeddedServer(root / "server") as server, ExitStack() as stack:
            stack.enter_context(_fewer_lines())
            client, *others = [stack.enter_context(_connect(server.url)) for _ in range(options.connections)]
            figures = simulate(options, client, others)
            version = client.info("server").get("valkey_version") or client.info("server")["redis_version"]
        facts = machine_facts(root, "cpu")
    result = {
        "command": "python -m benchmarks.fleet_sim " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "machine": {**facts, "server": version, "others_busy_cores": bystanders.busy_cores()},
        **figures,
    }
    if options.out is None:
        print(result)
    else:
        write_json(options.out, result)
    account = figures["account"]
    return 0 if account["lost"] == 0 and account["ended_twice"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
