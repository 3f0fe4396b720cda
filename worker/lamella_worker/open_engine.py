"""Opens the engine for a worker, and says in one message why it cannot be opened.

Importing this loads torch, so nothing imports it before the device is pinned; a worker whose engine is in a process of
its own never imports it.
"""

from __future__ import annotations

from lamella_engine import Engine, EngineOptions, ShardStore
from lamella_engine.device import resolve_device
from lamella_engine.errors import EngineError
from lamella_engine.out_of_memory import is_out_of_memory
from lamella_engine.progress import Progress, silent
from lamella_worker.config import EngineTable
from lamella_worker.worker_error import WorkerError


def open_engine(model: str, table: EngineTable, device: str, progress: Progress = silent) -> Engine:
    """Open the engine on `device` as the engine knows it, building the model's shards if the store lacks them.

    Raises:
        WorkerError: it cannot open.
    """
    try:
        options = EngineOptions(
            store=table.store,
            device=device,
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
        found = resolve_device(options.device)
        sharded = ShardStore(options.store).ensure(model, offline=options.offline, progress=progress)
        return Engine.open_sharded(sharded, found, options)
    except EngineError as error:
        raise WorkerError(f"cannot serve {model}: {error}") from error
    except (OSError, MemoryError, RuntimeError) as error:
        # The device or the disk refused in its own words; torch's out-of-memory error is a RuntimeError.
        message = f"cannot serve {model}: {type(error).__name__}: {error}"
        raise WorkerError(message, is_out_of_memory=is_out_of_memory(error)) from error
