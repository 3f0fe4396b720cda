"""Where figures about this worker's engine come from: asked at every look, by Flower's step and by metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lamella.messages import WorkerInfo
from lamella_engine.sequence_types import EngineCounters, PlanFacts


@dataclass(frozen=True)
class EngineSources:
    """Three questions; each may be asked at any time, from any thread, and is answered at once."""

    info: Callable[[], WorkerInfo]
    counters: Callable[[], EngineCounters]
    plan: Callable[[], PlanFacts | None]
