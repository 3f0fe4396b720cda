"""The worker on a fake server: a registry, jobs to submit, and a session around the scripted engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import redis

from lamella.keys import Keys
from lamella.messages import GenerateRequest, JobState, SamplingParams, decode_event
from lamella.queue_calls import serve_call
from lamella.registry_calls import submit_call
from lamella_worker.config import WorkerConfig, load_config
from lamella_worker.job_table import JobTable
from lamella_worker.lease_keeper import LeaseKeeper
from lamella_worker.publisher import Publisher
from lamella_worker.registry import Registry
from lamella_worker.session import Session, Verdict
from tests.worker.driven_engine import opened as opened
from tests.worker.one_model import OneModel
from tests.worker.scripted_engine import ScriptedEngine

MODEL = "tiny"
SLOTS = 100  # so that every job of a test is sent at once


@pytest.fixture
def keys() -> Keys:
    return Keys("t:")


@pytest.fixture
def registry(fake_redis: redis.Redis, keys: Keys) -> Registry:
    return Registry(fake_redis, keys)


@dataclass
class Jobs:
    """Submits jobs as a client does, and looks at their records and streams."""

    client: redis.Redis
    registry: Registry

    def submit(self, job_id: str, prompt: str = "hello", *, model: str = MODEL, max_tokens: int = 5) -> str:
        request = GenerateRequest(model=model, prompt=prompt, sampling=SamplingParams(max_tokens=max_tokens))
        self.registry.call(serve_call(self.registry.keys, "serving", model, SLOTS))
        self.registry.call(submit_call(self.registry.keys, job_id, request))
        return job_id

    def record(self, job_id: str) -> dict[str, str]:
        return self.client.hgetall(self.registry.keys.job(job_id))

    def state(self, job_id: str) -> JobState:
        return JobState(self.record(job_id)["state"])

    def events(self, job_id: str) -> list[Any]:
        """The stored events; fails unless they are numbered 1, 2, 3, ..."""
        entries = self.client.xrange(self.registry.keys.stream(job_id))
        assert [entry_id for entry_id, _ in entries] == [f"{n + 1}-0" for n in range(len(entries))]
        return [decode_event(fields["e"]) for _, fields in entries]

    def text(self, job_id: str) -> str:
        return "".join(event.text for event in self.events(job_id) if event.type == "token")

    def queue(self, model: str = MODEL) -> list[str]:
        """The jobs that Celery's queue tells of, latest first."""
        messages = self.client.lrange(self.registry.keys.queue_list(model), 0, -1)
        return [json.loads(message)["headers"]["id"] for message in messages]


@pytest.fixture
def jobs(fake_redis: redis.Redis, registry: Registry) -> Jobs:
    return Jobs(fake_redis, registry)


@pytest.fixture
def config() -> WorkerConfig:
    flags: dict[str, object] = {"worker.model": MODEL, "worker.lease_s": 0.6, "worker.drain_s": 5.0}
    return load_config(None, flags, environ={})


@dataclass
class Bench:
    """A session with everything around it that is not Celery."""

    engine: ScriptedEngine
    session: Session
    table: JobTable


@pytest.fixture
def make_bench(registry: Registry, config: WorkerConfig) -> Iterator[Callable[..., Bench]]:
    stops: list[Callable[[], object]] = []

    def make(name: str = "w1", registry: Registry = registry, **options: Any) -> Bench:
        engine = ScriptedEngine(**options)
        table = JobTable()
        session = Session(OneModel(engine), registry, table, config, name)
        publisher = Publisher(engine, table, session.delivery, lambda has_failed: session.give_up(), model=MODEL)
        keeper = LeaseKeeper(table, session.delivery, config.worker.lease_s)
        publisher.start()
        keeper.start()
        stops.extend([lambda: publisher.join(40), engine.close, lambda: keeper.stop(5), session.give_up])
        return Bench(engine, session, table)

    yield make
    while stops:
        stops.pop()()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture
def run(make_bench: Callable[..., Bench]) -> Any:
    """Run a job in a thread of its own, as Celery does."""
    used: list[Bench] = []
    with ThreadPoolExecutor(16, thread_name_prefix="task") as pool:

        def start(bench: Bench, job_id: str) -> Future[Verdict]:
            used.append(bench)
            return pool.submit(bench.session.run, job_id)

        yield start
        for bench in used:
            bench.session.give_up()
