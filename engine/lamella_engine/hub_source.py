"""A model of the hub as a place that weights come from: refused by its config alone, before its weights are fetched.

Neighbours: `hub` fetches, `checkpoint` reads what was fetched, `shard_store` asks.
"""

from __future__ import annotations

import torch

from lamella_engine import architecture, dequantise, hub, names
from lamella_engine.build_plan import BuildRequest
from lamella_engine.checkpoint import DirectoryCheckpoint
from lamella_engine.errors import ModelError, ModelNotFound
from lamella_engine.progress import Progress
from lamella_engine.weight_source import SourceKind


def request(
    name: str, dtype: str | None, token: str | None, progress: Progress, in_place: bool, absent: str
) -> BuildRequest:
    """Fetch the model `name`, and ask for its shards; `absent` says where it was looked for before.

    Raises:
        ModelError, ModelNotFound: the hub does not give it; with `absent` before the reason.
    """
    repository, _ = names.split_revision(name)
    try:
        pinned = hub.fetch_config(name, token)
    except ModelError as error:
        if type(error) not in (ModelError, ModelNotFound):
            raise
        raise type(error)(f"{absent}, and fetching it failed: {error}") from error
    source, revision = fetch(f"{repository}@{pinned.revision}", pinned, token, dtype, progress)
    return BuildRequest(name, source, SourceKind.HUB, f"hub:{repository}", revision, dtype, in_place)


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
