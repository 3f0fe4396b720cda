"""Builds a model's shards from a checkpoint, one layer in memory at a time.

A build that was cut off goes on where it stopped: each finished shard is recorded with its hash once it is safely on
the disk. Room on the disk is checked before anything is written. The caller holds the model's lock.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lamella_engine import architecture
from lamella_engine.checkpoint import ROOT_GROUP, Checkpoint, fingerprint
from lamella_engine.errors import DiskFull
from lamella_engine.manifest import (
    Manifest,
    ShardRecord,
    record_from_json,
    remember_verified,
    stamp_of,
    write_json,
    write_manifest,
)
from lamella_engine.progress import Progress
from lamella_engine.shard_writer import file_bytes, write_shard

logger = logging.getLogger(__name__)

BUILDING_FILE = "building.json"


@dataclass(frozen=True)
class Origin:
    """Where the checkpoint came from: what the manifest says of it."""

    name: str
    source: str
    revision: str | None


class _Build:
    """The record of a build under way: finished shards with their stamps, valid for one source and type only."""

    def __init__(self, directory: Path, source_hash: str, dtype: str) -> None:
        self._path = directory / BUILDING_FILE
        self._directory = directory
        self._key = [source_hash, dtype]
        self.records: dict[str, ShardRecord] = {}
        self.stamps: dict[str, list[int]] = {}
        self._load()

    def _load(self) -> None:
        try:
            raw: Any = json.loads(self._path.read_text())
            if raw["key"] != self._key:
                raise ValueError("another source")
            for item, stamp in raw["done"]:
                record = record_from_json(item)
                if (self._directory / record.file).is_file() and stamp_of(self._directory, record) == stamp:
                    self.records[record.file] = record
                    self.stamps[record.file] = stamp
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("starting the build in %s anew: %s", self._directory, error)
            self.records.clear()
            self.stamps.clear()

    def add(self, record: ShardRecord) -> None:
        """Remember a shard that is safely on the disk."""
        self.records[record.file] = record
        self.stamps[record.file] = stamp_of(self._directory, record)
        done = [(asdict(record), self.stamps[name]) for name, record in self.records.items()]
        write_json(self._path, {"key": self._key, "done": done})

    def finish(self) -> None:
        """Forget the record; the manifest has taken its place."""
        self._path.unlink(missing_ok=True)


def build(
    directory: Path, checkpoint: Checkpoint, origin: Origin, dtype: str | None, progress: Progress | None
) -> Manifest:
    """Build all shards of `checkpoint` in `directory` and publish them.

    Raises:
        UnsupportedModel: the family cannot run; nothing was written.
        DiskFull: the disk lacks room; checked before anything is written, and while writing.
        CheckpointError: the checkpoint is incomplete or corrupt.
    """
    stored = dtype or checkpoint.dtype
    built = architecture.build(checkpoint.config(), getattr(torch, stored))
    groups = checkpoint.groups(built, dtype)
    source_hash = fingerprint(checkpoint)
    work = _Build(directory, source_hash, stored)
    sizes = {group: file_bytes(source.expected()) for group, source in groups.items()}
    _check_room(directory, sum(size for group, size in sizes.items() if shard_file(group) not in work.records))
    directory.mkdir(parents=True, exist_ok=True)
    _clean(directory, keep=set(work.records))
    done = 0
    for group, source in groups.items():
        if shard_file(group) not in work.records:
            written = write_shard(directory / shard_file(group), source.load())
            work.add(
                ShardRecord(shard_file(group), written.data_start, written.nbytes, written.sha256, written.tensors)
            )
        done += sizes[group]
        if progress is not None:
            progress("shards", done, sum(sizes.values()))
    checkpoint.save_side_files(directory)
    remember_verified(directory, work.stamps)
    manifest = Manifest(
        name=origin.name,
        revision=origin.revision,
        source_kind=checkpoint.kind,
        source=origin.source,
        source_hash=source_hash,
        dtype=stored,
        family=built.family,
        root=work.records[shard_file(ROOT_GROUP)],
        layers=tuple(work.records[shard_file(index)] for index in range(len(built.layers))),
    )
    write_manifest(directory, manifest)
    work.finish()
    return manifest


def shard_file(group: int) -> str:
    """File name of a group's shard."""
    return "root.safetensors" if group == ROOT_GROUP else f"layer-{group:05d}.safetensors"


def _check_room(directory: Path, needed: int) -> None:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    status = os.statvfs(existing)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise DiskFull(
            f"the shards for {directory.name} need {needed:,} bytes more, {free:,} are free under {existing}. "
            "Make room, or choose another store (--store or LAMELLA_STORE).",
            needed,
            free,
        )


def _clean(directory: Path, keep: set[str]) -> None:
    """Remove what a cut-off build left behind: half-written files and shards that cannot be trusted."""
    for path in directory.iterdir():
        if path.name in keep or path.name == BUILDING_FILE:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
