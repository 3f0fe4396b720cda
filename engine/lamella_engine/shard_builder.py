"""Builds a model's shards from a checkpoint: plan, room, files, manifest, in this order.

Owns one build: nothing is written before the plan stands and the room for it is there; each finished shard is recorded
with its checksum, so that a killed build goes on where it was; the manifest comes last and publishes the model. The
caller holds the model's lock. Neighbours: `weight_source` and `convert` before it, `shard_writer` below it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lamella_engine import architecture, convert
from lamella_engine.build_plan import BuildRequest, PlannedShard, check_quant, plan_layers, plan_shard
from lamella_engine.calibrated_build import CalibratedBuild
from lamella_engine.convert import ModelPlan
from lamella_engine.errors import CheckpointError, DiskFull, ModelError, ShardError
from lamella_engine.in_place import link_original
from lamella_engine.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    ROOT_SHARD,
    Manifest,
    read_manifest,
    write_manifest,
)
from lamella_engine.packed_shard import expanded, write_packed
from lamella_engine.progress import BUILD, Progress
from lamella_engine.quant_mix import SizeTarget, find_mix
from lamella_engine.quant_spec import QuantSpec
from lamella_engine.shard_check import STAMPS_FILE, hash_file, hash_files, stamp_unless_recent, write_stamps
from lamella_engine.shard_writer import (
    PART_SUFFIX,
    ShardRecord,
    as_model_error,
    size_of,
    sync_directory,
    write_bytes,
    write_shard,
)

logger = logging.getLogger(__name__)

BUILT_FILE = "built.jsonl"
_BOOKKEEPING_BYTES = 65_536  # manifest, records and stamps: this much, and as much again per 200 shards
_OWN_FILES = frozenset({BUILT_FILE, STAMPS_FILE})


@dataclass(frozen=True)
class _Build:
    """A planned build in its directory; nothing is written yet."""

    request: BuildRequest
    built: architecture.Architecture
    plan: ModelPlan
    shards: tuple[PlannedShard, ...]
    originals: dict[str, Path]  # files of the source that stay in use, by their name in the build
    fingerprint: str
    directory: Path


def build(
    request: BuildRequest, model_directory: Path, progress: Progress, make_room: Callable[[int], object]
) -> Manifest:
    """Build and publish `request` in `model_directory`; an earlier, killed build of the same is continued.

    Args:
        request: what to build.
        model_directory: where.
        progress: told of every step.
        make_room: called with the bytes that are still to be written, before the first of them.

    Raises:
        UnsupportedModel: the family cannot run here; nothing was written.
        CheckpointError: the source is corrupt or incomplete; nothing is left behind.
        DiskFull: there is no room (nothing was written), or it went away (finished shards are kept).
    """
    planned = _plan(request, model_directory, progress)
    _remove_leftovers(model_directory, keep=planned.directory.name)
    finished = _finished_shards(planned)
    needed_bytes = _check_room(planned, finished, model_directory, make_room)
    with _cleaned_up(planned.directory, model_directory, needed_bytes):
        _make_directory(planned.directory)
        companions = _write_companions(planned)
        originals = _link_originals(planned, progress)
        records = _write_shards(planned, finished, _calibration(planned, finished), progress)
        if request.source.fingerprint != planned.fingerprint:
            raise CheckpointError(f"{request.source.path} was changed while it was read; try again when it is complete")
        manifest = _manifest(planned, companions, records, originals)
        _stamp(planned.directory, manifest)
        write_manifest(model_directory, manifest)
    _remove_leftovers(model_directory, keep=planned.directory.name)
    logger.info("built %s: %d shards, %d bytes, %s", request.name, len(records), manifest.size_bytes, manifest.dtype)
    return manifest


def _plan(request: BuildRequest, model_directory: Path, progress: Progress) -> _Build:
    source = request.source
    fingerprint = source.fingerprint
    config = source.load_config()
    claimed = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(claimed, int) or not 1 <= claimed <= source.num_tensors:
        raise CheckpointError(
            f"{source.path} claims {claimed} layers and holds {source.num_tensors} tensors; its config is not of "
            "these weights"
        )
    try:
        built = architecture.build(config, torch.float32)
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(f"the config of {source.path} does not make a model: {error}") from error
    plan = convert.plan(built, source.conversions(built), request.dtype)
    if isinstance(request.quant, SizeTarget):
        target, device, store = request.quant, request.quant_device, model_directory.parent
        check_free(request.name, target.nbytes, 0, store)
        mix = find_mix(plan, fingerprint, target, device, store, progress)
        request = replace(request, quant=mix.spec)
    if isinstance(request.quant, QuantSpec):
        check_quant(request.quant, plan)
    layers, originals = plan_layers(request, plan)
    shards = (plan_shard(ROOT_SHARD, plan.root, request.packing(None, plan.tied)), *layers)
    key = hashlib.sha256(f"{FORMAT_VERSION} {fingerprint} {plan.is_untied} {request.quant}".encode())
    for shard in shards:
        key.update(shard.key)
    return _Build(request, built, plan, shards, originals, fingerprint, model_directory / key.hexdigest()[:16])


def _remove_leftovers(model_directory: Path, keep: str) -> None:
    """Remove builds that are neither published nor `keep`; processes that opened their files keep reading them."""
    if not model_directory.is_dir():
        return
    try:
        published = read_manifest(model_directory)
    except ShardError:
        published = None
    kept = {keep, MANIFEST_FILE, *([published.build] if published else [])}
    for entry in model_directory.iterdir():
        if entry.name in kept:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _finished_shards(planned: _Build) -> dict[str, ShardRecord]:
    """Shards of an earlier, killed build that are whole: recorded, and their contents hash to what was recorded."""
    expected = {shard.file: shard for shard in planned.shards}
    finished: dict[str, ShardRecord] = {}
    for record in _recorded(planned.directory / BUILT_FILE):
        path = planned.directory / record.file
        shard = expected.get(record.file)
        if shard is None or not path.is_file() or path.stat().st_size != record.nbytes:
            continue
        if record.nbytes != shard.file_bytes and shard.packing is None:
            continue
        if hash_file(path) == record.sha256:
            finished[record.file] = record
    if finished:
        logger.info("going on with %s: %d of %d shards are built", planned.request.name, len(finished), len(expected))
    return finished


def _recorded(path: Path) -> list[ShardRecord]:
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            values = json.loads(line)
            records.append(ShardRecord(str(values["file"]), int(values["nbytes"]), str(values["sha256"])))
        except (ValueError, KeyError, TypeError):
            continue  # the line that was being written when the build was killed
    return records


def _check_room(
    planned: _Build, finished: dict[str, ShardRecord], model_directory: Path, make_room: Callable[[int], object]
) -> int:
    """The bytes that have still to be written, if there is room for them."""
    pending = [shard for shard in planned.shards if shard.file not in finished]
    block_bytes = 4096
    needed = sum(-(-shard.file_bytes // block_bytes) * block_bytes for shard in pending)
    needed += planned.request.source.companion_bytes + _BOOKKEEPING_BYTES * (1 + len(planned.shards) // 200)
    make_room(needed)
    reusable = sum(path.stat().st_size for path in planned.directory.glob(f"*{PART_SUFFIX}"))
    check_free(planned.request.name, needed, reusable, model_directory.parent)
    return needed


def check_free(name: str, needed: int, reusable: int, store: Path) -> None:
    """Raise DiskFull unless the file system of `store` has room for `needed` bytes, `reusable` of them written."""
    free = shutil.disk_usage(_nearest_existing(store)).free
    if free + reusable < needed:
        raise DiskFull(
            f"the shards of {name} need {needed:,} more bytes ({needed / 1e9:.1f} GB) and {store} has {free:,} free "
            f"({free / 1e9:.1f} GB). Nothing was written; free some space, or name another store with LAMELLA_STORE or "
            "--store.",
            needed,
            free,
        )


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def _cleaned_up(directory: Path, model_directory: Path, needed_bytes: int) -> Iterator[None]:
    """Leave nothing behind when the source is at fault; what was finished stays where the disk is."""
    try:
        yield
    except DiskFull:
        raise
    except OSError as error:
        raise as_model_error(error, directory, needed_bytes) from error
    except ModelError:
        shutil.rmtree(directory, ignore_errors=True)
        _remove_if_empty(model_directory)
        raise


def _remove_if_empty(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _make_directory(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for part in directory.glob(f"*{PART_SUFFIX}"):
        part.unlink()
    sync_directory(directory.parent)


def _write_companions(planned: _Build) -> tuple[ShardRecord, ...]:
    directory = planned.directory
    planned.request.source.write_companions(directory, planned.built.model.config)
    if planned.plan.is_untied:
        _untie(directory / "config.json")
    shard_files = {*(shard.file for shard in planned.shards), *planned.originals}
    records = []
    for path in sorted(directory.iterdir()):
        if not path.is_file() or path.name in shard_files or path.name in _OWN_FILES:
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
        records.append(ShardRecord(path.name, path.stat().st_size, hash_file(path)))
    return tuple(records)


def _untie(config_path: Path) -> None:
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["tie_word_embeddings"] = False
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _link_originals(planned: _Build, progress: Progress) -> tuple[ShardRecord, ...]:
    """Keep the source's files that layers are read from, under names of the build's own, and hash them."""
    for name, original in planned.originals.items():
        link_original(original, planned.directory / name)
    return hash_files(planned.directory, list(planned.originals), progress)


def _calibration(planned: _Build, finished: dict[str, ShardRecord]) -> CalibratedBuild | None:
    """What measures the layers that are to be packed for a text; None if there is none, or nothing left to pack."""
    request = planned.request
    text = request.quant.calibration if isinstance(request.quant, QuantSpec) else None
    if text is None or all(shard.file in finished for shard in planned.shards):
        return None
    packing = request.packing(None, planned.plan.tied)
    assert packing is not None, "there is a specification"
    root = replace(
        planned.plan.root, conversions=tuple(expanded(each, packing) for each in planned.plan.root.conversions)
    )
    plan = replace(planned.plan, root=root)  # the text passes the embedding as it is packed
    return CalibratedBuild(text, planned.built, plan, planned.directory, request.quant_device)


def _write_shards(
    planned: _Build, finished: dict[str, ShardRecord], calibration: CalibratedBuild | None, progress: Progress
) -> tuple[ShardRecord, ...]:
    total = sum(shard.data_bytes for shard in planned.shards)
    done = sum(shard.data_bytes for shard in planned.shards if shard.file in finished)
    progress(BUILD, done, total)

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(BUILD, min(done, total), total)

    records = []
    for number, shard in enumerate(planned.shards):
        layer = number - 1  # the first shard is what lies outside the layers
        record = finished.get(shard.file)
        if record is None:
            whole = shard if calibration is None or layer < 0 else calibration.measured(layer, shard)
            record = _write_one(planned.directory, whole, advance)
        records.append(record)
        if calibration is not None and layer >= 0:
            calibration.go_on(layer, planned.directory / record.file)
    progress(BUILD, total, total)
    return tuple(records)


def _write_one(directory: Path, shard: PlannedShard, advance: Callable[[int], None]) -> ShardRecord:
    def rename(native: str) -> str:
        return native.removeprefix(shard.plan.prefix)

    if shard.placed is not None:
        record = write_bytes(directory / shard.file, shard.placed.as_json())
    elif shard.packing is not None:
        record = write_packed(directory / shard.file, shard.plan.conversions, shard.packing, rename, advance)
    else:
        record = write_shard(directory / shard.file, shard.layout, shard.plan.conversions, rename, advance)
    with (directory / BUILT_FILE).open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"file": record.file, "nbytes": record.nbytes, "sha256": record.sha256}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return record


def _manifest(
    planned: _Build,
    companions: tuple[ShardRecord, ...],
    records: tuple[ShardRecord, ...],
    originals: tuple[ShardRecord, ...],
) -> Manifest:
    request = planned.request
    bytes_by_dtype: Counter[str] = Counter()
    for shard in planned.shards:
        for tensor in shard.plan.tensors:
            bytes_by_dtype[tensor.dtype] += size_of(tensor)
    return Manifest(
        name=request.name,
        family=planned.built.family,
        source_kind=request.kind.value,
        source=request.location,
        revision=request.revision,
        fingerprint=planned.fingerprint,
        dtype=bytes_by_dtype.most_common(1)[0][0],
        requested_dtype=request.dtype,
        build=planned.directory.name,
        root=records[0],
        layers=records[1:],
        companions=companions,
        built_at=time.time(),
        originals=originals,
        is_in_place=request.in_place,
        quant="" if request.quant is None else str(request.quant),
    )


def _stamp(directory: Path, manifest: Manifest) -> None:
    """Spare the first opening most of the hashing: until now nobody else could know of these files."""
    stamps = {record.file: stamp_unless_recent(directory / record.file) for record in manifest.files}
    write_stamps(directory, {file: stamp for file, stamp in stamps.items() if stamp is not None})
