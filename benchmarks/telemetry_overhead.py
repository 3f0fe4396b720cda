"""What watching costs: the pace of a worker's session with metrics and traces on, against the same without.

    python -m benchmarks.telemetry_overhead --sweeps 3000 --jobs 8

Everything but the model is real: an engine of no weights gives each job a token a sweep as fast as it is taken, so the
seconds are all the worker's own, and what is printed is the worst case of a sweep. Turns alternate, so that a busy
machine disturbs all alike; the median of each counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, generate_latest

from lamella.messages import TokenEvent
from lamella_engine.sequence_types import SequenceTokens, SweepEvents
from lamella_worker.job_watch import Claimed, JobWatch, JobWatchers
from lamella_worker.metrics_jobs import JobMetrics
from lamella_worker.running_job import RunningJob

TURNS = 7
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def sweep_cost(watch: JobWatch, num_jobs: int, num_sweeps: int) -> float:
    """Seconds a sweep of making and telling `num_jobs` jobs' tokens takes, without Redis and without a model."""
    jobs = [RunningJob(f"job{number}", 1, 1, 1) for number in range(num_jobs)]
    for job in jobs:
        watch.claimed(job, Claimed(time.time(), 0.1, 0, TRACE))
    began = time.perf_counter()
    for position in range(num_sweeps):
        batch = SweepEvents(tuple(SequenceTokens(job.sequence_id, position, (7,), "x") for job in jobs), (0.1,))
        watch.swept("m", batch.sweep_seconds, len(batch.events))
        for job in jobs:
            watch.stored(job, (TokenEvent(token_ids=(7,), text="x"),))
    return (time.perf_counter() - began) / num_sweeps


def watchers() -> dict[str, JobWatch]:
    """Every kind of watching, by name; `traces` only where OpenTelemetry is installed."""
    found = {"off": JobWatch(), "metrics": JobWatchers([JobMetrics(CollectorRegistry(), "m")])}
    try:
        from opentelemetry.sdk.trace import TracerProvider

        from lamella_worker.job_traces import JobTraces
    except ImportError:
        return found
    provider = TracerProvider(shutdown_on_exit=False)
    traces = JobTraces(provider, "m", "w")
    found["metrics and traces"] = JobWatchers([JobMetrics(CollectorRegistry(), "m"), traces])
    return found


def scrape_cost() -> float:
    """Seconds a scrape of a worker's job metrics takes, to text."""
    registry = CollectorRegistry()
    JobMetrics(registry, "m")
    began = time.perf_counter()
    for _ in range(100):
        generate_latest(registry)
    return (time.perf_counter() - began) / 100


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a line for each kind of watching."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=3000, help="sweeps of each turn")
    parser.add_argument("--jobs", type=int, default=8, help="jobs that ride each sweep")
    options = parser.parse_args(arguments)
    kinds = watchers()
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(TURNS):
        for name, watch in kinds.items():
            seconds[name].append(sweep_cost(watch, options.jobs, options.sweeps))
    off = statistics.median(seconds["off"])
    for name, found in seconds.items():
        more = statistics.median(found) - off
        print(f"{name:20} {1e6 * statistics.median(found):8.1f} us a sweep of {options.jobs} jobs, {1e6 * more:+.1f}")
    print(f"{'scrape':20} {1e6 * scrape_cost():8.1f} us")


if __name__ == "__main__":
    main()
