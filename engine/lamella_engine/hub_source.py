"""A model of the hub as a place that weights come from: refused by its config alone, before its weights are fetched.

Neighbours: `hub` fetches, `checkpoint` reads what was fetched, `shard_store` asks.
"""

from __future__ import annotations

import torch

from lamella_engine import architecture, dequantise, hub
from lamella_engine.checkpoint import DirectoryCheckpoint
from lamella_engine.progress import Progress


def fetch(
    name: str, pinned: hub.HubSnapshot, token: str | None, expand_to: str | None, progress: Progress
) -> tuple[DirectoryCheckpoint, str]:
    """Fetch the weights of `name`, whose config lies in `pinned`; the checkpoint, and the commit it is of.

    Raises:
        UnsupportedModel: it cannot run here; no weights were fetched.
        ModelError: it cannot be fetched, or is incomplete.
    """
    config = architecture.load_config(pinned.directory)
    settings = dequantise.find_settings(config, pinned.directory)
    if settings is not None:
        dequantise.check_settings(settings)
    dequantise.forget_settings(config)
    architecture.build(config, torch.float32)
    snapshot = hub.download(name, token=token, progress=progress)
    return DirectoryCheckpoint.open(snapshot.directory, expand_to=expand_to), snapshot.revision
