"""Many jobs over many ``kill -9``: ``python -m benchmarks.soak`` (`make soak`).

Starts a server, workers and client processes, lets a few requests run undisturbed, and then thousands of them while
workers are killed and started again. Everything but the scripted engine is the real thing in real processes. Exit code
1 if a job was lost, doubled, different or stuck, or recovery took longer than the lease and two seconds. Neighbours:
`soak_plan` what is asked for, `soak_fleet` workers, `soak_client` clients, `soak_report` the verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import cast

import redis

from benchmarks.machine import machine_facts
from benchmarks.soak_fleet import ROOT, SoakFleet, WorkerTerms
from benchmarks.soak_plan import MODEL, SoakAnswer, SoakPlan, SoakRequest, draw_requests, read_answers
from benchmarks.soak_report import GRACE_S, Kill, Leftovers, Record, Verdict, judge
from lamella.embedded import EmbeddedServer
from lamella.keys import Keys

KEYS = Keys()
JOB_TIMEOUT_S = 300.0
SETTLE_S = 90.0  # for the last deliveries to be forgotten: kombu's visibility timeout and a round
REST_S = 1.0  # between two kills at least


class Clients:
    """Client processes, and how many of their jobs have ended."""

    def __init__(self, plans: list[SoakPlan], directory: Path) -> None:
        self._answers: list[Path] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._ended = 0
        for number, plan in enumerate(plans):
            path, answers = directory / f"plan-{number}.json", directory / f"answers-{number}.json"
            plan.write(path)
            self._answers.append(answers)
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.soak_client", str(path), str(answers)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            self._processes.append(process)
            reader = threading.Thread(target=self._count, args=(process,), name="soak-count", daemon=True)
            self._readers.append(reader)
            reader.start()

    @property
    def ended(self) -> int:
        """Jobs that have ended."""
        with self._lock:
            return self._ended

    @property
    def are_running(self) -> bool:
        """Whether a client process still works."""
        return any(process.poll() is None for process in self._processes)

    def finish(self) -> list[SoakAnswer]:
        """Wait for the clients, and return what came.

        Raises:
            RuntimeError: a client process failed.
        """
        for process in self._processes:
            if process.wait(2 * JOB_TIMEOUT_S):
                raise RuntimeError(f"a client process ended with {process.returncode}")
        for reader in self._readers:
            reader.join(10.0)
        return [answer for path in self._answers for answer in read_answers(path)]

    def close(self) -> None:
        """End what still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait(10.0)

    def _count(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for _ in process.stdout:
            with self._lock:
                self._ended += 1


def held_jobs(server: redis.Redis, worker: str) -> dict[str, int]:
    """The jobs that a worker holds, with the number of their last stored event."""
    ids = cast(list[str], server.zrange(KEYS.flight(MODEL), 0, -1))
    with server.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hmget(KEYS.job(job_id), ["state", "worker", "seq"])
        rows = pipe.execute()
    return {
        job_id: int(seq)
        for job_id, (state, holder, seq) in zip(ids, rows, strict=True)
        if state == "running" and holder == worker
    }


def disturb(fleet: SoakFleet, names: list[str], clients: Clients, options: argparse.Namespace, url: str) -> list[Kill]:
    """Kill workers, one at a time, evenly over the jobs; each is started again at once."""
    draw = random.Random(options.seed)
    kills: list[Kill] = []
    with redis.Redis.from_url(url, protocol=2, decode_responses=True, socket_timeout=30) as server:
        for number in range(options.kills):
            at_least = int(options.jobs * (number + draw.random()) / (options.kills + 1))
            resting_until = time.monotonic() + REST_S
            while clients.are_running and (clients.ended < at_least or time.monotonic() < resting_until):
                time.sleep(0.01)
            if not clients.are_running:
                break
            name = draw.choice(names)
            fleet.kill(name)
            killed_at = time.monotonic()
            kills.append(Kill(name, killed_at, held_jobs(server, name)))
            fleet.start(name)
            print(f"{clients.ended:6d} jobs ended; killed {name} with {len(kills[-1].held)} jobs", flush=True)
    return kills


def records_of(server: redis.Redis, answers: list[SoakAnswer]) -> dict[str, Record]:
    """What the server holds of each job."""
    ids = [answer.job_id for answer in answers if answer.job_id]
    with server.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hmget(KEYS.job(job_id), ["state", "seq", "tokens", "attempts"])
            pipe.xlen(KEYS.stream(job_id))
        raw = pipe.execute()
    found = {}
    for job_id, (state, seq, tokens, attempts), stored in zip(ids, raw[::2], raw[1::2], strict=True):
        found[job_id] = Record(str(state), int(seq or 0), int(stored), int(tokens or 0), int(attempts or 0))
    return found


def leftovers_of(server: redis.Redis) -> Leftovers:
    """What the server holds besides, once deliveries of killed workers had the time to run out."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        left = Leftovers(
            server.zcard(KEYS.active),
            server.zcard(KEYS.flight(MODEL)),
            server.llen(KEYS.queue_list(MODEL)),
            server.zcard(f"{KEYS.prefix}unacked_index"),
        )
        if not any(asdict(left).values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def plans_for(
    url: str, requests: tuple[SoakRequest, ...], jobs: list[tuple[int, int]], options: argparse.Namespace
) -> list[SoakPlan]:
    """Deal the jobs out to the client processes."""
    share = max(1, options.waiting // options.clients)
    return [
        SoakPlan(url, requests, tuple(jobs[number :: options.clients]), share, JOB_TIMEOUT_S)
        for number in range(options.clients)
    ]


def soak(options: argparse.Namespace, directory: Path) -> tuple[Verdict, Leftovers, dict[str, object]]:
    """Run it all; returns the verdict, what is left on the server, and figures of the run."""
    terms = WorkerTerms(options.engine, options.slots, options.lease_s, options.max_attempts)
    names = [f"w{number + 1}" for number in range(options.workers)]
    requests = draw_requests(options.seed, options.max_tokens)
    with EmbeddedServer(directory / "server") as server, SoakFleet(server.url, terms, directory) as fleet:
        fleet.start(names[0])
        fleet.wait_listed(names[:1])
        calm_jobs = [(-1 - number, number) for number in range(len(requests))]
        calm = _run(plans_for(server.url, requests, calm_jobs, options)[:1], calm_jobs, directory)
        for name in names[1:]:
            fleet.start(name)
        fleet.wait_listed(names)
        draw = random.Random(options.seed + 1)
        jobs = [(number, draw.randrange(len(requests))) for number in range(options.jobs)]
        print(f"undisturbed: {len(calm)} requests; now {len(jobs)} jobs, {options.kills} kills", flush=True)
        clients = Clients(plans_for(server.url, requests, jobs, options), directory)
        try:
            began = time.monotonic()
            kills = disturb(fleet, names, clients, options, server.url)
            answers = clients.finish()
            took_s = time.monotonic() - began
        finally:
            clients.close()
        with redis.Redis.from_url(server.url, protocol=2, decode_responses=True, socket_timeout=30) as look:
            records, left = records_of(look, answers), leftovers_of(look)
        logs = "".join(fleet.log(name) for name in names)
        figures: dict[str, object] = {
            "seconds": round(took_s, 1),
            "kills": len(kills),
            "jobs_held_at_kills": sum(len(kill.held) for kill in kills),
            "tokens": sum(len(answer.token_ids) for answer in answers),
            "workers_that_ended_by_themselves": fleet.died(),
            "messages_sent_again": logs.count("its message is sent again"),
            "tracebacks": logs.count("Traceback"),
        }
        return judge(answers, calm, kills, records), left, figures


def _run(plans: list[SoakPlan], jobs: list[tuple[int, int]], directory: Path) -> list[SoakAnswer]:
    """Let one client ask for `jobs` in peace."""
    (first, *_) = plans
    clients = Clients([SoakPlan(first.url, first.requests, tuple(jobs), first.concurrency, JOB_TIMEOUT_S)], directory)
    try:
        return clients.finish()
    finally:
        clients.close()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--jobs", type=int, default=4000)
    parser.add_argument("--kills", type=int, default=40, help="kill -9 of workers, spread over the jobs")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--slots", type=int, default=8, help="jobs a worker runs at once")
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    parser.add_argument("--waiting", type=int, default=64, help="jobs asked for and not ended, at most")
    parser.add_argument("--max-tokens", type=int, default=60, help="of the longest request")
    parser.add_argument("--lease-s", type=float, default=3.0)
    parser.add_argument("--max-attempts", type=int, default=10, help="kills are not the jobs' fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("scripted", "tiny"), default="scripted")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(arguments)
    for name in ("jobs", "workers", "slots", "clients", "waiting", "max_tokens", "max_attempts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if options.kills < 0 or not 0.5 <= options.lease_s <= 3600:
        parser.error("--kills must not be below 0, and --lease-s lies between 0.5 and 3600")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the soak and tell; returns the exit code."""
    options = _options(arguments)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as directory:
        facts = machine_facts(Path(directory), "cpu")
        verdict, left, figures = soak(options, Path(directory))
    is_recovery_short = verdict.recovery_p99_s <= options.lease_s + GRACE_S
    result = {
        "command": f"python -m benchmarks.soak {' '.join(sys.argv[1:] if arguments is None else arguments)}".strip(),
        "machine": facts,
        "load_before": [round(value, 2) for value in load],
        "load_after": [round(value, 2) for value in os.getloadavg()],
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "run": figures,
        "verdict": verdict.as_json(),
        "left_on_the_server": asdict(left),
        "recovery_bound_s": options.lease_s + GRACE_S,
        "is_recovery_p99_within_bound": is_recovery_short,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
    is_clean = verdict.is_clean and not any(asdict(left).values()) and not figures["workers_that_ended_by_themselves"]
    return 0 if is_clean and is_recovery_short else 1


if __name__ == "__main__":
    sys.exit(main())
