"""What a host's store has complete, told cheaply and without torch: for heartbeats, which come every two seconds.

Looks at the store's directory and at one manifest a model, and reads a manifest only when it changed; never at shards.
`shard_store` is what opens and checks models.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from lamella_engine import names

MANIFEST_FILE = "manifest.json"
MOST_TOLD = 64
_MOST_LOOKED_AT = 1000
_MAX_MANIFEST_BYTES = 16 << 20


class StoredModel(NamedTuple):
    """A complete model: its name, the bytes of its shards, and of the largest layer."""

    name: str
    size_bytes: int
    largest_layer_bytes: int


class StoredModels:
    """The complete models of one store, as of the last look."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read: dict[str, tuple[tuple[int, int], StoredModel | None]] = {}  # by directory: the manifest's stamp

    def look(self) -> tuple[StoredModel, ...]:
        """The models, those published last first, at most `MOST_TOLD`; a store that cannot be read has none."""
        found: list[tuple[int, StoredModel]] = []
        seen = set()
        for directory in self._directories():
            try:
                stat = os.stat(self._root / directory / MANIFEST_FILE)
            except OSError:
                continue
            seen.add(directory)
            stamp = (stat.st_mtime_ns, stat.st_size)
            if self._read.get(directory, (None,))[0] != stamp:
                self._read[directory] = (stamp, _read(self._root / directory / MANIFEST_FILE))
            if (model := self._read[directory][1]) is not None:
                found.append((stat.st_mtime_ns, model))
        for gone in self._read.keys() - seen:
            del self._read[gone]
        return tuple(model for _, model in sorted(found, reverse=True)[:MOST_TOLD])

    def _directories(self) -> list[str]:
        try:
            listed = sorted(name for name in os.listdir(self._root) if not name.startswith("."))
        except OSError:
            return []
        return [name for name in listed if names.is_model_name(name.replace("+", "/"))][:_MOST_LOOKED_AT]


def _read(path: Path) -> StoredModel | None:
    """What the manifest says; None for one that is damaged, which opening it reports."""
    try:
        with path.open("rb") as file:
            parsed = json.loads(file.read(_MAX_MANIFEST_BYTES))
        layers = [int(each["nbytes"]) for each in parsed["layers"]]
        placed = [int(each["nbytes"]) for each in parsed.get("originals", ())]
        total = int(parsed["root"]["nbytes"]) + sum(layers) + sum(placed)
        largest = max(layers, default=0) if not placed else sum(placed) // max(1, len(layers))
        name = str(parsed["name"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return StoredModel(name, total, largest) if names.is_model_name(name) else None
