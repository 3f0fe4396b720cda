"""Layers read from the checkpoint they came in, without a second copy on disk.

Owns whether a layer's tensors lie in one file of the source as a shard would hold them, the small file that says where
instead of a shard, and the link that keeps the source's file in the build. A hard link where the file system allows it:
then the weights stay when the original is deleted. Neighbours: `shard_builder` writes these, `shard_check` reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lamella_engine.binding import TORCH_DTYPES
from lamella_engine.convert import ShardPlan
from lamella_engine.errors import ShardError
from lamella_engine.safetensors_header import TensorEntry
from lamella_engine.shard import Shard, TensorSpec

SUFFIX = ".json"
_ALIGNMENT = 16  # of tensors to each other: what matrix kernels want of an address
_MOST_WASTED = 0.02  # bytes between a layer's tensors that are read for nothing

FindTensor = Callable[[str], tuple[Path, TensorEntry] | None]


@dataclass(frozen=True)
class PlacedLayer:
    """Where a layer lies: `nbytes` bytes of `file` from `start` on; `tensors` have their offsets from there."""

    file: str
    start: int
    nbytes: int
    tensors: tuple[TensorSpec, ...]

    def as_json(self) -> bytes:
        """The small file's contents."""
        return json.dumps(asdict(self), indent=1).encode()


def find_layer(plan: ShardPlan, find: FindTensor) -> tuple[Path, PlacedLayer] | None:
    """The file that a layer of `plan` can be read from as it is, and where; None if it has to be written anew.

    All its tensors must be stored as the model has them, in one file and next to each other.
    """
    entries: list[tuple[str, TensorEntry]] = []
    files: set[Path] = set()
    for conversion in plan.conversions:
        found = find(conversion.sources[0]) if conversion.is_copy else None
        if found is None:
            return None
        files.add(found[0])
        entries.append((conversion.targets[0].name.removeprefix(plan.prefix), found[1]))
    if len(files) != 1:
        return None
    start = min(entry.start for _, entry in entries)
    nbytes = max(entry.start + entry.nbytes for _, entry in entries) - start
    used = sum(entry.nbytes for _, entry in entries)
    offsets = [entry.start - start for _, entry in entries]
    is_aligned = all(offset % _ALIGNMENT == 0 for offset in offsets) and all(
        entry.start % TORCH_DTYPES[entry.dtype].itemsize == 0 for _, entry in entries
    )
    if not is_aligned or nbytes - used > _MOST_WASTED * used:
        return None
    file = files.pop()
    specs = tuple(
        TensorSpec(name, entry.dtype, entry.shape, entry.start - start, entry.nbytes)
        for name, entry in sorted(entries, key=lambda each: each[1].start)
    )
    return file, PlacedLayer(file.name, start, nbytes, specs)


def link_original(original: Path, link: Path) -> None:
    """Make `link` another name of the file `original`, or where that cannot be a pointer to it.

    Raises:
        OSError: neither is possible.
    """
    blob = original.resolve()
    link.unlink(missing_ok=True)
    try:
        os.link(blob, link)
    except OSError:  # another file system, or one without hard links
        link.symlink_to(blob)


def is_own_copy(path: Path) -> bool:
    """False for a file of a build that is another name of a file elsewhere: removing it frees nothing."""
    return not path.is_symlink() and path.stat().st_nlink == 1


def read_layer(path: Path, digests: dict[str, str]) -> Shard:
    """The layer that the small file `path` describes; `digests` has the SHA-256 of the build's linked files, by name.

    Raises:
        ShardError: it is damaged, or reaches beyond the file it names.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        start, nbytes, file = int(values["start"]), int(values["nbytes"]), values["file"]
        specs = tuple(
            TensorSpec(
                str(each["name"]), str(each["dtype"]), tuple(map(int, each["shape"])), int(each["offset"]),
                int(each["nbytes"]),
            )
            for each in values["tensors"]
        )  # fmt: skip
        total = (path.parent / file).stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"it does not say where the layer lies ({error})") from error
    is_inside = start >= 0 and nbytes > 0 and start + nbytes <= total and file in digests
    if not is_inside or any(spec.offset < 0 or spec.offset + spec.nbytes > nbytes for spec in specs):
        raise ShardError("what it describes does not lie in a file of the model")
    return Shard(path.parent / file, start, nbytes, specs, digests[file])
