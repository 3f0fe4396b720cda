"""Opens the engines for a worker, and says in one message why they cannot be opened.

Importing this loads torch, so nothing imports it before the device is pinned; a worker whose engine is in a process of
its own never imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lamella_engine import EngineOptions, ShardStore
from lamella_engine.device import resolve_device
from lamella_engine.engine_group import EngineGroup
from lamella_engine.errors import EngineError
from lamella_engine.out_of_memory import is_out_of_memory
from lamella_engine.peer_address import Peers
from lamella_engine.progress import Progress, silent
from lamella_worker.config import EngineTable
from lamella_worker.engine_port import ServedModel
from lamella_worker.worker_error import WorkerError


def open_engines(
    models: Sequence[ServedModel], table: EngineTable, device: str, progress: Progress = silent
) -> EngineGroup:
    """Open an engine a model on `device` as the engine knows it, building shards that the store lacks.

    Raises:
        WorkerError: they cannot open, all of them together.
    """
    about = ", ".join(model.name for model in models)
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
            peers=table.peers,
        )
        found = resolve_device(options.device)
        store, sharded = ShardStore(options.store, peers=Peers.named(options.peers)), {}
        for model in models:
            about = model.name
            sharded[model.name] = store.ensure(model.opened_as, offline=options.offline, progress=progress)
        about = ", ".join(sharded)
        return EngineGroup.open(sharded, found, options, {model.name: model.share for model in models})
    except EngineError as error:
        raise WorkerError(f"cannot serve {about}: {error}") from error
    except (OSError, MemoryError, RuntimeError) as error:
        # The device or the disk refused in its own words; torch's out-of-memory error is a RuntimeError.
        message = f"cannot serve {about}: {type(error).__name__}: {error}"
        raise WorkerError(message, is_out_of_memory=is_out_of_memory(error)) from error
