"""Where figures about this worker's engines come from: asked at every look, by Flower's step and by metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lamella.messages import WorkerInfo
from lamella_engine.sequence_types import EngineCounters, PlanFacts


@dataclass(frozen=True)
class EngineSources:
    """Three questions, two of them about one model; each may be asked from any thread, and is answered at once."""

    info: Callable[[], WorkerInfo]
    counters: Callable[[str], EngineCounters]
    plan: Callable[[str], PlanFacts | None]
