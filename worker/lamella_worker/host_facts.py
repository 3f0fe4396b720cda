"""What a worker tells of its host beside its own work: its device's memory, the models in the store, its keys.

Owns nothing but the question; `heartbeat` carries the answer, `lamella.candidates` makes use of it.
"""

from __future__ import annotations

import os
from pathlib import Path

from lamella.key_ring import KeyRing
from lamella.messages import WorkerInfo
from lamella.stored_model import StoredModelInfo
from lamella_engine.stored_models import StoredModels
from lamella_worker.device import PinnedDevice


class HostFacts:
    """Adds to a heartbeat what its host has.

    Args:
        device: what the worker runs on.
        store: directory of its shard cache.
        ring: the worker's encryption keys, if it has any.
    """

    def __init__(self, device: PinnedDevice, store: Path, ring: KeyRing | None = None) -> None:
        self._key_ids = ring.key_ids if ring is not None else ()
        self._memory_bytes = device.memory_bytes if device.engine_device != "cpu" else _host_memory_bytes()
        self._stored = StoredModels(store)

    def add_to(self, info: WorkerInfo) -> WorkerInfo:
        """The heartbeat with them."""
        stored = tuple(StoredModelInfo(*model) for model in self._stored.look())
        told = {"memory_bytes": self._memory_bytes, "stored": stored, "key_ids": self._key_ids}
        return info.model_copy(update=told)


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
