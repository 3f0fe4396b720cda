"""Room in a store: its quota, what each model takes, and which go when there is no more.

The quota belongs to the store and not to a process: it lies in a file there, so that every worker of the host keeps to
it. Those that were not opened for longest go first; what is open, is being built, or is built from, stays. Neighbours:
`model_use` knows who has a model open, `model_lock` who builds it; `shard_store` asks for room before it builds.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lamella_engine import names
from lamella_engine.byte_size import byte_size
from lamella_engine.errors import DiskFull, ModelError, ShardError
from lamella_engine.in_place import is_own_copy
from lamella_engine.manifest import MANIFEST_FILE
from lamella_engine.model_lock import ModelLock
from lamella_engine.model_use import LOCKS_DIRECTORY, is_in_use, last_used_s, unused
from lamella_engine.shard_writer import sync_directory

logger = logging.getLogger(__name__)

QUOTA_FILE = ".quota"
CONVERTED_DIRECTORY = ".converted"  # pickles on their way to shards, one directory a model
_REMOVE_WAIT_S = 1.0


@dataclass(frozen=True)
class Occupant:
    """A model in the store, or what a killed build left of one.

    Attributes:
        name: the model's name.
        nbytes: bytes that removing it frees; files that it shares with an original elsewhere do not count.
        used_at: Unix seconds of its last opening, or of its building.
        is_in_use: a process has it open.
    """

    name: str
    nbytes: int
    used_at: float
    is_in_use: bool


class StoreRoom:
    """The room of one store; any number of processes may use it at once.

    What another process is building meanwhile counts with what it has written so far.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def quota(self) -> int | None:
        """Bytes that all models may take together; None if nobody set a quota.

        Raises:
            ShardError: the file that says so is damaged.
        """
        path = self._root / QUOTA_FILE
        try:
            return int(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ShardError(
                f"{path} says no quota that can be read ({error}); set it again: `lamella models quota SIZE`"
            ) from error

    def set_quota(self, nbytes: int | None) -> None:
        """Set the quota, or remove it; nothing is deleted until room is needed."""
        path = self._root / QUOTA_FILE
        if nbytes is None:
            path.unlink(missing_ok=True)
            return
        self._root.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(f"{nbytes}\n", encoding="utf-8")
        part.replace(path)

    def occupants(self) -> list[Occupant]:
        """Everything that takes room, those first that were not used for longest."""
        directories = self._root.iterdir() if self._root.is_dir() else ()
        models = [path for path in directories if path.is_dir() and not path.name.startswith(".")]
        return sorted(map(self._occupant, models), key=lambda each: each.used_at)

    def make_room(self, needed_bytes: int, keep: Collection[str] = ()) -> list[Occupant]:
        """Remove models until `needed_bytes` more fit the quota; returns those removed. Does nothing without a quota.

        Raises:
            DiskFull: that would not be enough; nothing was removed.
        """
        quota = self.quota
        return [] if quota is None else self.shrink(quota - needed_bytes, keep, needed_bytes)

    def shrink(self, most_bytes: int, keep: Collection[str] = (), needed_bytes: int = 0) -> list[Occupant]:
        """Remove models until all take at most `most_bytes`; returns those removed.

        Raises:
            DiskFull: what has to stay takes more; nothing was removed.
        """
        removed: list[Occupant] = []
        stays = set(keep)
        while chosen := self.choose(most_bytes, stays, needed_bytes):
            for each in chosen:
                try:
                    self.remove(each.name)
                except ModelError as error:
                    logger.info("%s stays: %s", each.name, error)  # taken up since it was looked at
                    stays.add(each.name)
                else:
                    removed.append(each)
                    logger.info("removed %s for room: %s, not in use", each.name, byte_size(each.nbytes))
        return removed

    def choose(self, most_bytes: int, keep: Collection[str] = (), needed_bytes: int = 0) -> list[Occupant]:
        """The models that `shrink` would remove.

        Raises:
            DiskFull: as there.
        """
        occupants = self.occupants()
        excess = sum(each.nbytes for each in occupants) - most_bytes
        chosen: list[Occupant] = []
        for each in occupants:
            if excess <= 0:
                break
            if each.is_in_use or each.name in keep or not each.nbytes:
                continue
            chosen.append(each)
            excess -= each.nbytes
        if excess > 0:
            raise self._full(occupants, keep, most_bytes, needed_bytes)
        return chosen

    def remove(self, name: str) -> int:
        """Remove a model that nobody has open or builds; returns the bytes freed.

        Raises:
            ModelError: it is in use.
        """
        with unused(self._root, name) as is_unused:
            if not is_unused:
                raise ModelError(f"{name} is in use")
            return self.remove_anyway(name)

    def remove_anyway(self, name: str) -> int:
        """Remove a model, or what a killed build left of it; whoever has it open goes on with the files it opened.

        Raises:
            ModelError: another process is building it.
            ShardError: it cannot be removed.
        """
        directory_name = names.directory_name(name)
        directory = self._root / directory_name
        places = [place for place in (directory, self._root / CONVERTED_DIRECTORY / directory_name) if place.is_dir()]
        try:
            with ModelLock(self._root / LOCKS_DIRECTORY, directory_name).held(name, _REMOVE_WAIT_S):
                nbytes = sum(map(_own_bytes, places))
                if directory in places:
                    (directory / MANIFEST_FILE).unlink(missing_ok=True)
                    sync_directory(directory)
                for place in places:
                    shutil.rmtree(place)
        except OSError as error:
            raise ShardError(f"cannot remove {directory}: {error.strerror or error}") from error
        return nbytes

    def _occupant(self, directory: Path) -> Occupant:
        name = names.model_name(directory)
        used_at = max(last_used_s(self._root, name), directory.stat().st_mtime)
        return Occupant(name, _own_bytes(directory), used_at, is_in_use(self._root, name))

    def _full(
        self, occupants: Collection[Occupant], keep: Collection[str], most_bytes: int, needed_bytes: int
    ) -> DiskFull:
        stays = [each for each in occupants if each.is_in_use or each.name in keep]
        told = ", ".join(f"{each.name} ({byte_size(each.nbytes)})" for each in stays if each.nbytes) or "nothing"
        limit = most_bytes + needed_bytes
        wanted = f", and {byte_size(needed_bytes)} more are needed" if needed_bytes else ""
        return DiskFull(
            f"the models in {self._root} may take {byte_size(limit)}{wanted}; in use and to stay: {told}. Nothing was "
            "removed; raise the quota (`lamella models quota SIZE`), or end what uses them",
            needed_bytes,
            max(0, most_bytes - sum(each.nbytes for each in stays)),
        )


def _own_bytes(place: Path) -> int:
    total = 0
    for path in place.rglob("*"):
        try:
            if path.is_file() and is_own_copy(path):
                total += path.stat().st_size
        except FileNotFoundError:
            continue  # removed or renamed by whoever builds there
    return total
