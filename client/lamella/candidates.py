"""Which workers serve a model, which have its shards near, and which could take it: from heartbeats alone, best first.

Owns the order and the words; asks nobody. Neighbours: `operations` (the heartbeats), `errors.NoWorkerError` and the
command ``lamella models where`` (which tell).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum

from lamella.messages import WorkerInfo

LEAST_LAYERS = 3  # of memory, below which layers cannot stream: two slots and what every sweep needs beside them


class Standing(IntEnum):
    """What a worker is to a model, the best first."""

    SERVES = 0
    HAS_SHARDS = 1
    COULD_TAKE = 2
    TOO_SMALL = 3
    DRAINING = 4


_WORDS = {
    Standing.SERVES: "serves it",
    Standing.HAS_SHARDS: "has the shards",
    Standing.COULD_TAKE: "could take it",
    Standing.TOO_SMALL: "has too little memory",
    Standing.DRAINING: "is stopping",
}


@dataclass(frozen=True)
class Candidate:
    """One worker, as it stands to a model.

    Attributes:
        worker, host, device: which one.
        memory_bytes: of its device, None where it does not tell.
        standing: what it is to the model.
        model: this one if it serves it, else the first that it serves.
        running, slots: jobs of that at hand, of those it may have.
    """

    worker: str
    host: str
    device: str
    memory_bytes: int | None
    standing: Standing
    model: str
    running: int
    slots: int

    @property
    def words(self) -> str:
        """The standing, for people."""
        return _WORDS[self.standing]

    def as_dict(self) -> dict[str, object]:
        """The candidate as plain values."""
        return {**asdict(self), "standing": self.standing.name.lower()}

    def advice(self, model: str) -> str | None:
        """What to run so that this worker's host serves `model`; None where it does already, or cannot."""
        match self.standing:
            case Standing.HAS_SHARDS:
                return (
                    f"host {self.host} (of worker {self.worker}) has the shards of {model}: start a worker there with "
                    f"`lamella worker --model {model}`"
                )
            case Standing.COULD_TAKE:
                return f"worker {self.worker} could take it: `lamella models pull {model} --on {self.worker}`"
            case Standing.SERVES | Standing.TOO_SMALL | Standing.DRAINING:
                return None


def rank(model: str, workers: Sequence[WorkerInfo]) -> list[Candidate]:
    """Every worker as it stands to `model`: those that serve it with the most room, then those that could best."""
    largest = max(
        (each.largest_layer_bytes for worker in workers for each in worker.stored if each.name == model), default=0
    )
    return sorted((_candidate(model, worker, largest) for worker in workers), key=_order)


def _candidate(model: str, worker: WorkerInfo, largest: int) -> Candidate:
    serving = next((each for each in worker.served if each.name == model), worker.served[0])
    standing, memory_bytes = _standing(model, worker, largest), worker.memory_bytes
    told = worker.name, worker.host, worker.device, memory_bytes, standing, serving.name, serving.running, serving.slots
    return Candidate(*told)


def _order(each: Candidate) -> tuple[int, float, int, str]:
    busy = each.running / max(1, each.slots)
    return each.standing, busy, -(each.memory_bytes or 0), each.worker


def _standing(model: str, worker: WorkerInfo, largest_layer_bytes: int) -> Standing:
    if worker.draining:
        return Standing.DRAINING
    if any(each.name == model for each in worker.served):
        return Standing.SERVES
    if worker.memory_bytes is not None and worker.memory_bytes < LEAST_LAYERS * largest_layer_bytes:
        return Standing.TOO_SMALL
    return Standing.HAS_SHARDS if any(each.name == model for each in worker.stored) else Standing.COULD_TAKE
