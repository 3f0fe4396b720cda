"""Metrics and Flower tell each model's figures, once, under its own name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from lamella.messages import ModelInfo, WorkerInfo
from lamella_engine.sequence_types import EngineCounters, PlanFacts
from lamella_worker.engine_sources import EngineSources
from lamella_worker.engine_totals import NO_COUNTERS, ended, summed, together
from lamella_worker.flower_info import FlowerInfo
from lamella_worker.metrics_engine import EngineCollector
from lamella_worker.metrics_fleet import Fleet, FleetCollector
from tests.scrape import Scrape
from tests.worker.test_heartbeat import worker_info

PLAN = PlanFacts(0, 0, 4, 0, 0, 100, 64, 100, 16, None, 100, 0.1, True)


def counters(tokens: int) -> EngineCounters:
    return EngineCounters(
        running=1, waiting=0, sweeps=2, tokens=tokens, streamed_bytes=0, peak_rss_bytes=tokens, last_sweep_at=tokens,
        batch_limit=4,
    )  # fmt: skip


@pytest.fixture
def info() -> WorkerInfo:
    models = tuple(
        ModelInfo(
            name=name, family="f", dtype="d", num_layers=1, context_length=1, size_bytes=1, slots=slots, running=running
        )
        for name, slots, running in (("a", 4, 1), ("b", 2, 2))
    )
    return worker_info(model=models[0], models=models, slots=6, running=3)


@pytest.fixture
def sources(info: WorkerInfo) -> EngineSources:
    return EngineSources(lambda: info, lambda model: counters({"a": 10, "b": 20}[model]), lambda model: PLAN)


def values(text: str, name: str) -> dict[str, float]:
    return {sample.labels["model"]: sample.value for sample in Scrape(text).samples if sample.name == name}


def test_every_metric_of_the_engines_has_a_series_for_each_model(sources: EngineSources) -> None:
    registry = CollectorRegistry()
    registry.register(EngineCollector(sources))

    text = generate_latest(registry).decode()

    assert values(text, "lamella_engine_tokens_total") == {"a": 10, "b": 20}
    assert values(text, "lamella_running_jobs") == {"a": 1, "b": 2}
    assert values(text, "lamella_batch_limit_sequences") == {"a": 4, "b": 2}
    assert set(values(text, "lamella_worker_info")) == {"a", "b"}
    assert text.count("# TYPE lamella_running_jobs ") == 1


def test_the_fleets_slots_are_counted_by_model(info: WorkerInfo) -> None:
    registry = CollectorRegistry()
    registry.register(FleetCollector(lambda: Fleet(workers=(info,))))

    text = generate_latest(registry).decode()

    assert values(text, "lamella_worker_slots") == {"a": 4, "b": 2}
    assert values(text, "lamella_busy_slots") == {"a": 1, "b": 2}
    assert values(text, "lamella_workers") == {"a": 1, "b": 1}


def test_flower_shows_lines_for_each_model(sources: EngineSources) -> None:
    consumer = SimpleNamespace(app=SimpleNamespace(lamella_sources=sources))

    lines = FlowerInfo(consumer).info(consumer)

    assert {"lamella model a", "lamella plan b", "lamella engine a", "lamella engine b"} <= set(lines)
    assert "1 of 2 sequences run" in str(lines["lamella engine b"])


def test_totals_add_up_and_what_is_of_now_goes_with_its_engine() -> None:
    first, second = counters(10), counters(20)

    one_after_the_other = summed(ended(first), second)
    side_by_side = together([first, second])

    assert (one_after_the_other.tokens, one_after_the_other.running, one_after_the_other.batch_limit) == (30, 1, 4)
    assert (side_by_side.tokens, side_by_side.running, side_by_side.peak_rss_bytes) == (30, 2, 20)
    assert side_by_side.last_sweep_at == 20
    assert together([]) == NO_COUNTERS
