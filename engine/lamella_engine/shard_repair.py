"""Makes a damaged model whole again from what it was built from: bad files aside, and only they are built anew.

Owns what may stand in for the first source: the same checkpoint, unchanged, or the same commit on the hub; for a packed
form first the model in full precision beside it, built from the same. Neighbours: `shard_check` finds damage,
`shard_store` asks, `shard_builder` builds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lamella_engine import hub, hub_source, names, shard_check
from lamella_engine.build_plan import BuildRequest
from lamella_engine.device import resolve_device
from lamella_engine.errors import ModelError, OptionError
from lamella_engine.manifest import Manifest
from lamella_engine.open_source import open_source
from lamella_engine.progress import Progress
from lamella_engine.quant_spec import parse_quant
from lamella_engine.stored_checkpoint import StoredCheckpoint
from lamella_engine.weight_source import SourceKind

logger = logging.getLogger(__name__)

DAMAGED_DIRECTORY = ".damaged"  # in the store; may be removed at any time


def request_again(
    manifest: Manifest,
    stored: Callable[[str], StoredCheckpoint],
    hub_token: str | None,
    progress: Progress,
    *,
    offline: bool,
) -> BuildRequest | None:
    """What builds the same files as those of `manifest`; None where that cannot be had.

    `stored` opens a model of the store in full precision; raises ModelError.
    """
    try:
        if not manifest.quant:
            return _from_source(manifest, hub_token, progress, offline=offline)
        quant = parse_quant(manifest.quant)
        if str(quant) != manifest.quant:  # a text for calibration that is another one by now
            raise ModelError(f"it was packed as {manifest.quant}, and now that would be {quant}")
        request = _from_store(manifest, stored) or _from_source(manifest, hub_token, progress, offline=offline)
        return request and replace(request, quant=quant, quant_device=resolve_device("auto"))
    except (ModelError, OptionError, OSError) as error:
        logger.warning("%s cannot be built again from %s: %s", manifest.name, manifest.source, error)
        return None


def _from_store(manifest: Manifest, stored: Callable[[str], StoredCheckpoint]) -> BuildRequest | None:
    base, _ = names.split_variant(manifest.name)
    if manifest.requested_dtype is not None:
        return None
    try:
        source = stored(base)
    except ModelError as error:
        logger.info("%s is not packed again from %s: %s", manifest.name, base, error)
        return None
    if source.fingerprint != manifest.fingerprint:
        return None
    return BuildRequest(manifest.name, source, source.kind, source.location, source.revision, None)


def _from_source(
    manifest: Manifest, hub_token: str | None, progress: Progress, *, offline: bool
) -> BuildRequest | None:
    if manifest.source_kind == SourceKind.HUB:
        return None if offline else _from_hub(manifest, hub_token, progress)
    source = open_source(Path(manifest.source), expand_to=manifest.requested_dtype)
    if source.fingerprint != manifest.fingerprint:
        logger.warning("%s is not what %s was built from any more", manifest.source, manifest.name)
        return None
    kind, dtype = SourceKind(manifest.source_kind), manifest.requested_dtype
    return BuildRequest(manifest.name, source, kind, manifest.source, None, dtype, manifest.is_in_place)


def _from_hub(manifest: Manifest, token: str | None, progress: Progress) -> BuildRequest | None:
    if manifest.revision is None:
        return None
    pinned_name = f"{manifest.source.removeprefix('hub:')}@{manifest.revision}"
    dtype = manifest.requested_dtype
    source, revision = hub_source.fetch(pinned_name, hub.fetch_config(pinned_name, token), token, dtype, progress)
    return BuildRequest(manifest.name, source, SourceKind.HUB, manifest.source, revision, dtype, manifest.is_in_place)


def set_aside(manifest: Manifest, directory: Path, store: Path) -> None:
    """Move the damaged files of a build out of it, over those that were set aside before.

    They are kept, so that what happened can be looked at, and so that a bad place of the disk is not used again.
    Processes that have them open keep reading them. The model's lock is to be held.
    """
    place = store / DAMAGED_DIRECTORY / directory.parent.name
    for path in shard_check.damaged_files(manifest, directory):
        logger.error("%s is damaged; it is set aside in %s and built again", path, place)
        place.mkdir(parents=True, exist_ok=True)
        os.replace(path, place / path.name)
