"""Watching jobs: what is counted for each way an attempt ends, and that watching never harms a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import redis
from prometheus_client import CollectorRegistry, generate_latest

from lamella.messages import Cancelled, Done, Failed, JobState, TokenEvent
from lamella.registry_calls import claim_call, nudge_call
from lamella_worker.config import WorkerConfig
from lamella_worker.job_table import JobTable
from lamella_worker.job_watch import JobWatch, JobWatchers
from lamella_worker.metrics_jobs import JobMetrics
from lamella_worker.publisher import Publisher
from lamella_worker.reconciler import Reconciler
from lamella_worker.registry import Registry
from lamella_worker.running_job import RunningJob
from lamella_worker.session import Session, Verdict
from tests.scrape import Scrape
from tests.waiting import wait_until
from tests.worker.conftest import MODEL, Jobs
from tests.worker.one_model import OneModel
from tests.worker.scripted_engine import ScriptedEngine


class Watching:
    """A session around the scripted engine whose jobs are watched."""

    def __init__(self, session: Session, engine: ScriptedEngine, prometheus: CollectorRegistry) -> None:
        self.session = session
        self.engine = engine
        self._prometheus = prometheus

    def count(self, name: str, **labels: str) -> float:
        found = Scrape(generate_latest(self._prometheus).decode())
        return found.value(f"lamella_{name}", model=MODEL, **labels)


Watch = Callable[..., Watching]


@pytest.fixture
def watch(registry: Registry, config: WorkerConfig) -> Iterator[Watch]:
    stops: list[Callable[[], object]] = []

    def make(*others: JobWatch) -> Watching:
        prometheus = CollectorRegistry()
        watchers = JobWatchers([*others, JobMetrics(prometheus, MODEL)])
        engine, table = ScriptedEngine(), JobTable()
        session = Session(OneModel(engine), registry, table, config, "w1", watch=watchers)
        publisher = Publisher(engine, table, session.delivery, lambda has_failed: session.give_up(), watchers, MODEL)
        publisher.start()
        stops.extend([lambda: publisher.join(40), engine.close, session.give_up])
        return Watching(session, engine, prometheus)

    yield make
    while stops:
        stops.pop()()


def test_a_job_that_ends_well_is_counted_once_with_its_latencies(watch: Watch, jobs: Jobs) -> None:
    watching = watch()
    jobs.submit("j", max_tokens=5)

    watching.session.run("j")

    assert watching.count("tokens_total") == 5
    assert watching.count("prompt_tokens_total") == len("hello")
    assert watching.count("attempts_total") == watching.count("attempts_ended_total", outcome="ended") == 1
    assert watching.count("jobs_total", state="done") == 1
    assert watching.count("time_to_first_token_seconds_count") == watching.count("queue_wait_seconds_count") == 1
    assert watching.count("inter_token_seconds_count") == 4


def test_the_time_to_the_first_token_counts_from_acceptance(watch: Watch, jobs: Jobs, fake_redis: redis.Redis) -> None:
    watching = watch()
    jobs.submit("j")
    accepted = int(jobs.record("j")["created_at"])
    fake_redis.hset(jobs.registry.keys.job("j"), "created_at", accepted - 70_000)

    watching.session.run("j")

    assert 70 <= watching.count("queue_wait_seconds_sum") <= watching.count("time_to_first_token_seconds_sum") < 130
    assert watching.count("inter_token_seconds_sum") < 40


def test_a_resumed_job_has_its_first_token_behind_it(watch: Watch, jobs: Jobs) -> None:
    watching = watch()
    jobs.submit("j", "crash now")
    watching.session.run("j")
    first = watching.count("attempts_ended_total", outcome="attempt_failed")

    again = watching.session.run("j")

    assert again is Verdict.ACK, "its queue sends another message"
    assert (first, watching.count("attempts_ended_total", outcome="attempt_failed")) == (1, 2)
    assert watching.count("queue_wait_seconds_count") == 1
    assert watching.count("time_to_first_token_seconds_count") == 0


def test_a_job_without_attempts_left_is_counted_as_dead(watch: Watch, jobs: Jobs) -> None:
    watching = watch()
    jobs.submit("j", "crash now")

    for _ in range(4):
        watching.session.run("j")

    assert watching.count("attempts_total") == 3
    assert watching.count("dead_jobs_total") == watching.count("jobs_total", state="failed") == 1
    assert jobs.state("j") is JobState.FAILED


def test_a_refused_write_is_counted(watch: Watch, jobs: Jobs, fake_redis: redis.Redis) -> None:
    watching = watch()
    jobs.submit("j", max_tokens=100_000)
    fence = jobs.registry.keys.job("j")

    def steal() -> bool:
        return bool(fake_redis.hget(fence, "seq") != "0" and fake_redis.hincrby(fence, "fence", 1))

    import threading

    task = threading.Thread(target=watching.session.run, args=("j",))
    task.start()
    wait_until(steal)
    task.join(40)

    assert watching.count("fenced_writes_total") >= 1
    assert watching.count("attempts_ended_total", outcome="lost") == 1
    assert watching.count("jobs_total", state="done") == 0


def test_nudges_are_counted(registry: Registry, jobs: Jobs, fake_redis: redis.Redis) -> None:
    prometheus = CollectorRegistry()
    reconciler = Reconciler(fake_redis, registry, "w1", 1.0, JobMetrics(prometheus, MODEL))
    jobs.submit("j")
    registry.call(claim_call(registry.keys, "j", "dead worker", 0, 3))

    wait_until(lambda: (reconciler.tick(), len(jobs.queue()) == 2)[1])

    assert Scrape(generate_latest(prometheus).decode()).value("lamella_nudges_total") == 1
    assert nudge_call(registry.keys, "j", MODEL, 1).keys


class Broken(JobWatch):
    """Fails at the first token it is told of."""

    def __init__(self) -> None:
        self.told = 0

    def stored(self, job: RunningJob, events: Sequence[TokenEvent | Done | Failed | Cancelled]) -> None:
        self.told += 1
        raise ZeroDivisionError("no figure")


def test_a_watcher_that_fails_is_left_out_and_the_job_goes_on(
    watch: Watch, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    watching = watch(broken)
    jobs.submit("j", max_tokens=5)

    watching.session.run("j")

    assert jobs.state("j") is JobState.DONE
    assert broken.told == 1
    assert watching.count("tokens_total") == 5
    assert "Broken failed and is left out" in caplog.text
