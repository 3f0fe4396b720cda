"""What Flower's worker page, and ``celery inspect stats``, show of the engine beside Celery's own figures.

Owns one step of the consumer that does nothing but answer. The app carries whom it asks as `lamella_sources`. Flower
shows each entry of the statistics on a line of its own ("Other"), so device, model, plan and engine are one line each
for people, each with the model's name where there are several; under ``lamella`` is the heartbeat as data.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps

from lamella.messages import ModelInfo, WorkerInfo
from lamella_engine.byte_size import byte_size
from lamella_engine.sequence_types import EngineCounters, PlanFacts
from lamella_worker.engine_sources import EngineSources


class FlowerInfo(bootsteps.StartStopStep):  # type: ignore[misc]  # celery publishes no types
    """Adds the worker's own figures to Celery's statistics."""

    def info(self, consumer: Any) -> dict[str, object]:
        """Return what the heartbeat tells, as plain data, and a line for each thing one looks for."""
        sources: EngineSources = consumer.app.lamella_sources
        info = sources.info()
        lines: dict[str, object] = {"lamella device": info.device}
        for model in info.served:
            which = "" if len(info.served) == 1 else f" {model.name}"
            lines[f"lamella model{which}"] = _model(model)
            lines[f"lamella plan{which}"] = _plan(sources.plan(model.name))
            lines[f"lamella engine{which}"] = _engine(info, model, sources.counters(model.name))
        return {**lines, "lamella": info.model_dump(mode="json")}


def _model(model: ModelInfo) -> str:
    size = byte_size(model.size_bytes)
    return (
        f"{model.name}: {model.family}, {model.num_layers} layers, {size} as {model.dtype}, "
        f"context {model.context_length} tokens"
    )


def _plan(plan: PlanFacts | None) -> str:
    if plan is None:
        return "none"
    placed = (
        (plan.layers_in_vram, plan.bytes_in_vram, "in VRAM"),
        (plan.layers_in_ram, plan.bytes_in_ram, "in RAM"),
        (plan.layers_on_disk, plan.bytes_on_disk, "on disk"),
    )
    layers = ", ".join(f"{count} layers ({byte_size(nbytes)}) {where}" for count, nbytes, where in placed if count)
    budgets = f"RAM {byte_size(plan.ram_bytes)}"
    if plan.vram_bytes is not None:
        budgets = f"VRAM {byte_size(plan.vram_bytes)}, {budgets}"
    basis = "measured" if plan.is_limit_measured else "assumed"
    return (
        f"{layers}; budgets {budgets}; {plan.kv_tokens} tokens of key-value cache ({byte_size(plan.kv_bytes)}); "
        f"{plan.sweep_tokens} tokens a sweep; at best {plan.limit_s:.4g} s a sweep ({basis})"
    )


def _engine(info: WorkerInfo, model: ModelInfo, counters: EngineCounters) -> str:
    process = info.engine_process
    state = "in this process" if process is None else f"{process.state}, restarted {process.restarts} times"
    sweeps = max(1, counters.sweeps)
    wanted = counters.experts_visited
    kept = counters.experts_in_vram + counters.experts_in_ram
    experts = f"; {kept / wanted:.0%} of experts were near" if wanted else ""
    return (
        f"{state}; {counters.running} of {model.slots} sequences run, {counters.waiting} wait; "
        f"{counters.sweeps} sweeps of {counters.sweep_s / sweeps:.4g} s, {counters.bubble_s / sweeps:.4g} s of them "
        f"waiting; {counters.tokens} tokens; a sweep used {byte_size(counters.disk_bytes // sweeps)} from disk, "
        f"{byte_size(counters.ram_bytes // sweeps)} from RAM, {byte_size(counters.vram_bytes // sweeps)} from VRAM; "
        f"{counters.kv_blocks_used} of {counters.kv_blocks} cache blocks; {counters.preemptions} preemptions{experts}"
    )
