"""Metrics of all workers together, on a fake server with the real scripts."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis
from prometheus_client import CollectorRegistry, generate_latest

from lamella.embedded import EmbeddedServer
from lamella.keys import Keys
from lamella.messages import Done, Usage
from lamella.registry_calls import claim_call, emit_call, retry_call
from lamella_worker import metrics_fleet
from lamella_worker.metrics_fleet import MODELS_SHOWN, FleetCollector, FleetReader, targets
from lamella_worker.registry import Registry, open_redis
from tests.scrape import Scrape
from tests.test_dashboards import worker_info
from tests.worker.conftest import MODEL, Jobs


@pytest.fixture
def look(fake_redis: redis.Redis, keys: Keys) -> Callable[[], Scrape]:
    def look() -> Scrape:
        registry = CollectorRegistry()
        registry.register(FleetCollector(FleetReader(fake_redis, keys).read))
        return Scrape(generate_latest(registry).decode())

    return look


def enlist(client: redis.Redis, keys: Keys, name: str, **fields: object) -> None:
    info = worker_info().model_copy(update={"name": name, **fields})
    client.set(keys.worker(name), info.model_dump_json())
    client.zadd(keys.workers, {name: 1})


def test_waiting_and_running_jobs_are_counted_by_their_records(jobs: Jobs, look: Callable[[], Scrape]) -> None:
    for number in range(5):
        jobs.submit(f"j{number}")
    jobs.submit("other", model="else")
    claim = jobs.registry.call(claim_call(jobs.registry.keys, "j0", "w", 60_000, 3))
    jobs.registry.call(claim_call(jobs.registry.keys, "j1", "w", 60_000, 3))
    done = Done(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=0))
    jobs.registry.call(emit_call(jobs.registry.keys, "j0", claim.fence, 1, 60_000, (done,)))

    found = look()

    assert found.value("lamella_redis_up") == 1
    assert found.value("lamella_queue_jobs", model=MODEL) == 3
    assert found.value("lamella_active_jobs", model=MODEL) == 1
    assert found.value("lamella_queue_jobs", model="else") == 1
    assert found.value("lamella_workers", model="else") == 0


def test_the_age_is_that_of_the_oldest_job_that_waits(
    jobs: Jobs, fake_redis: redis.Redis, look: Callable[[], Scrape]
) -> None:
    jobs.submit("young")
    jobs.submit("old")
    fake_redis.hset(jobs.registry.keys.job("old"), "created_at", int((time.time() - 90) * 1000))

    age_s = look().value("lamella_queue_age_seconds", model=MODEL)

    assert 89 < age_s < 150


def test_a_model_without_waiting_jobs_has_no_age(
    keys: Keys, fake_redis: redis.Redis, look: Callable[[], Scrape]
) -> None:
    enlist(fake_redis, keys, "w1")

    assert look().value("lamella_queue_age_seconds", model=MODEL) == 0


def test_draining_workers_give_no_slots_but_their_jobs_count(
    keys: Keys, fake_redis: redis.Redis, look: Callable[[], Scrape]
) -> None:
    enlist(fake_redis, keys, "w1", running=2, slots=4)
    enlist(fake_redis, keys, "w2", running=1, slots=4, draining=True)

    found = look()

    assert found.value("lamella_workers", model=MODEL) == 1
    assert found.value("lamella_worker_slots", model=MODEL) == 4
    assert found.value("lamella_busy_slots", model=MODEL) == 3


def test_dead_jobs_are_counted_until_they_are_retried(jobs: Jobs, look: Callable[[], Scrape]) -> None:
    keys = jobs.registry.keys
    jobs.submit("poison")
    for _ in range(2):
        jobs.registry.call(claim_call(keys, "poison", "w", 0, 1))

    before = look().value("lamella_retriable_dead_jobs", model=MODEL)
    jobs.registry.call(retry_call(keys, "poison", "again"))

    assert before == 1
    assert look().value("lamella_retriable_dead_jobs", model=MODEL) == 0


def test_models_that_clients_name_at_will_share_a_label(jobs: Jobs, look: Callable[[], Scrape]) -> None:
    for number in range(2 * MODELS_SHOWN):
        jobs.submit(f"j{number}", model=f"model-{number}")
    jobs.submit("more", model="model-7")

    found = look()

    waiting = {s.labels["model"]: s.value for s in found.samples if s.name == "lamella_queue_jobs"}
    assert len(waiting) == MODELS_SHOWN + 1
    assert waiting["other"] == MODELS_SHOWN
    assert waiting["model-7"] == 2


def test_many_jobs_are_read_page_by_page(
    jobs: Jobs, look: Callable[[], Scrape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_fleet, "PAGE", 3)
    for number in range(10):
        jobs.submit(f"j{number}")

    assert look().value("lamella_queue_jobs", model=MODEL) == 10


def test_redis_is_not_asked_again_within_seconds(jobs: Jobs, fake_redis: redis.Redis, keys: Keys) -> None:
    reader = FleetReader(fake_redis, keys)
    first = reader.read()

    jobs.submit("j")

    assert reader.read() is first


def test_a_server_that_restarts_is_told_of_and_found_again(
    own_server: EmbeddedServer, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_fleet, "KEEP_S", 0.0)
    client = open_redis(own_server.url, 2.0)
    reader = FleetReader(client, keys)
    before = reader.read()

    own_server.stop()
    away = reader.read()
    own_server.start()

    assert before is not None
    assert away is None
    assert reader.read() is not None
    client.close()


def test_targets_are_the_workers_that_serve_metrics(registry: Registry, fake_redis: redis.Redis, keys: Keys) -> None:
    enlist(fake_redis, keys, "w1", metrics_address="127.0.0.1:9464")
    enlist(fake_redis, keys, "w2")

    found = targets(FleetReader(fake_redis, keys).read())

    assert found == [{"targets": ["127.0.0.1:9464"], "labels": {"lamella_worker": "w1"}}]
    assert targets(None) == []
