"""Metrics of this worker's engines: what moved, how long its lanes were busy, how full it is.

Owns their names and meaning. Nothing is counted here: every scrape asks the engines for their totals, which come from
their process with each sweep and four times a second between sweeps. Neighbours: `metrics_jobs`, `metrics_server`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from lamella.messages import ModelInfo, WorkerInfo
from lamella_engine.sequence_types import EngineCounters, PlanFacts
from lamella_worker.engine_sources import EngineSources

TIERS = ("disk", "ram", "vram")


class EngineCollector(Collector):
    """Turns the engines' totals into metrics; safe to scrape from several threads."""

    def __init__(self, sources: EngineSources) -> None:
        self._sources = sources
        self._lock = threading.Lock()
        self._highest: dict[tuple[str, str, str], float] = {}

    def collect(self) -> Iterator[Metric]:
        """Ask for everything, once; each metric has a series for every model."""
        info = self._sources.info()
        found: dict[str, Metric] = {}
        with self._lock:
            for model in info.served:
                for family in self._of_model(info, model):
                    before = found.setdefault(family.name, family)
                    if before is not family:
                        before.samples.extend(family.samples)
        yield from found.values()

    def _of_model(self, info: WorkerInfo, model: ModelInfo) -> Iterator[Metric]:
        counters, plan = self._sources.counters(model.name), self._sources.plan(model.name)
        yield from self._totals(info, model.name, counters)
        yield from _now(info, model, counters)
        yield from () if plan is None else _plan(model.name, plan)
        yield _about(info, model)

    def _totals(self, info: WorkerInfo, model: str, counters: EngineCounters) -> Iterable[Metric]:
        restarts = 0 if info.engine_process is None else info.engine_process.restarts
        yield self._counter(model, "sweeps", "Sweeps done.", counters.sweeps)
        yield self._counter(model, "engine_tokens", "Tokens drawn, those of lost attempts included.", counters.tokens)
        yield self._counter(
            model, "streamed_bytes", "Weight bytes that moved to where they were computed.", counters.streamed_bytes
        )
        yield self._counter(model, "preemptions", "Sequences sent back to wait for memory.", counters.preemptions)
        yield self._counter(model, "out_of_memory_sweeps", "Sweeps that ran out of memory.", counters.out_of_memory)
        yield self._counter(model, "engine_restarts", "Times the engine's process was started again.", restarts)
        yield self._counter(
            model, "experts_wanted", "Experts wanted of layers that came without them.", counters.experts_visited
        )
        kept = {"vram": counters.experts_in_vram, "ram": counters.experts_in_ram}
        yield self._counter(model, "experts_kept", "Those of them kept near from earlier sweeps.", kept, "tier")
        used = dict(zip(TIERS, (counters.disk_bytes, counters.ram_bytes, counters.vram_bytes), strict=True))
        yield self._counter(model, "weight_bytes", "Weight bytes that sweeps used, by where they waited.", used, "tier")
        lanes = {
            "read": counters.read_s,
            "copy": counters.copy_s,
            "compute": counters.compute_s,
            "bubble": counters.bubble_s,
            "sweep": counters.sweep_s,
        }
        meaning = "Busy seconds of each lane; bubble is the part of sweeps in which nothing was computed."
        yield self._counter(model, "lane_seconds", meaning, lanes, "lane")

    def _counter(
        self, model: str, name: str, meaning: str, value: float | Mapping[str, float], label: str | None = None
    ) -> CounterMetricFamily:
        """A total that never falls: reports of an engine may overtake each other, and a fall looks like a restart."""
        family = CounterMetricFamily(f"lamella_{name}", meaning, labels=["model", *([label] if label else [])])
        for key, total in value.items() if isinstance(value, Mapping) else [("", value)]:
            highest = max(total, self._highest.get((model, name, key), 0.0))
            self._highest[model, name, key] = highest
            family.add_metric([model, *([key] if label else [])], highest)
        return family


def _gauge(model: str, name: str, meaning: str, value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"lamella_{name}", meaning, labels=["model"])
    family.add_metric([model], value)
    return family


def _by_tier(model: str, name: str, meaning: str, values: Iterable[float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"lamella_{name}", meaning, labels=["model", "tier"])
    for tier, value in zip(TIERS, values, strict=True):
        family.add_metric([model, tier], value)
    return family


def _now(info: WorkerInfo, about: ModelInfo, counters: EngineCounters) -> Iterable[Metric]:
    model = about.name
    process = info.engine_process
    yield _gauge(model, "running_jobs", "Jobs that this worker holds.", about.running)
    yield _gauge(model, "running_sequences", "Sequences that ride the sweeps.", counters.running)
    yield _gauge(model, "waiting_sequences", "Sequences in the engine that wait for room.", counters.waiting)
    yield _gauge(model, "batch_limit_sequences", "Sequences that may ride side by side now.", about.slots)
    yield _gauge(model, "kv_blocks", "Blocks of the key-value cache.", counters.kv_blocks)
    yield _gauge(model, "kv_blocks_used", "Blocks of it that sequences hold.", counters.kv_blocks_used)
    yield _gauge(model, "memory_peak_bytes", "Most host memory that the engine ever held.", counters.peak_rss_bytes)
    yield _gauge(model, "draining", "1 once the worker takes no more jobs.", info.draining)
    yield _gauge(model, "engine_ready", "1 while an engine is open.", process is None or process.state == "ready")
    last = (info.last_sweep_at if len(info.served) == 1 else counters.last_sweep_at) or 0.0
    yield _gauge(model, "last_sweep_timestamp_seconds", "When it last got on, in Unix seconds; 0 before.", last)


def _plan(model: str, plan: PlanFacts) -> Iterable[Metric]:
    placed_bytes = (plan.bytes_on_disk, plan.bytes_in_ram, plan.bytes_in_vram)
    placed_layers = (plan.layers_on_disk, plan.layers_in_ram, plan.layers_in_vram)
    yield _by_tier(model, "plan_bytes", "Bytes of layers, and of a streamed head, that wait in a tier.", placed_bytes)
    yield _by_tier(model, "plan_layers", "Layers that wait in a tier.", placed_layers)
    limit = GaugeMetricFamily(
        "lamella_sweep_limit_seconds",
        "A sweep of one token at best, by what was measured of this machine or, for small models, assumed.",
        labels=["model", "basis"],
    )
    limit.add_metric([model, "measured" if plan.is_limit_measured else "assumed"], plan.limit_s)
    yield limit


def _about(info: WorkerInfo, model: ModelInfo) -> Metric:
    names = ["model", "worker", "version", "device", "family", "dtype"]
    family = GaugeMetricFamily("lamella_worker_info", "1; its labels say who this is.", labels=names)
    family.add_metric([model.name, info.name, info.version, info.device, model.family, model.dtype], 1)
    return family
