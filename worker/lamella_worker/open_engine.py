"""Opens the engine for a worker, and says in one message why it cannot be opened.

Importing this loads torch, so nothing imports it before the device is pinned.
"""

from __future__ import annotations

from lamella_engine import Engine, EngineOptions
from lamella_engine.errors import EngineError
from lamella_worker.config import WorkerConfig
from lamella_worker.device import PinnedDevice
from lamella_worker.worker_error import WorkerError


def open_engine(config: WorkerConfig, device: PinnedDevice) -> Engine:
    """Open the engine, building the model's shards if the store lacks them.

    Raises:
        WorkerError: it cannot open.
    """
    table = config.engine
    try:
        options = EngineOptions(
            store=table.store,
            device=device.engine_device,
            dtype=table.dtype,
            max_sequences=table.max_sequences,
            sweep_tokens=table.sweep_tokens,
            kv_tokens=table.kv_tokens,
            vram=table.vram,
            ram=table.ram,
            expert_cache=table.expert_cache,
            shared_memory=table.shared_memory,
            offline=table.offline,
        )
        return Engine.open(config.worker.model, options)
    except EngineError as error:
        raise WorkerError(f"cannot serve {config.worker.model}: {error}") from error
    except (OSError, MemoryError, RuntimeError) as error:
        # The device or the disk refused in its own words; torch's out-of-memory error is a RuntimeError.
        raise WorkerError(f"cannot serve {config.worker.model}: {type(error).__name__}: {error}") from error
