"""A checkpoint directory whose weights are pickles (``pytorch_model.bin``): converted before anything reads it.

Only for callers who were told that the pickles are trusted. Each file is opened in a process of its own (`unpickle`),
written as safetensors into a place that is removed afterwards, and read from there as any other checkpoint. Neighbours:
`shard_store` before it, `weight_files` and `checkpoint` after it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamella_engine import unpickle
from lamella_engine.checkpoint import DirectoryCheckpoint, WeightFiles, fingerprint_of
from lamella_engine.errors import CheckpointError, DiskFull, ModelNotFound
from lamella_engine.progress import CONVERT, Progress
from lamella_engine.safetensors_header import FILE_DTYPES
from lamella_engine.weight_files import (
    CONFIG_FILE,
    INDEX_FILE,
    PICKLED_FILE,
    PICKLED_INDEX,
    SINGLE_FILE,
    find_weights,
    read_weight_map,
    why_no_config,
)

logger = logging.getLogger(__name__)

START_S = 120.0  # for the process to import torch on a busy host
SLOWEST_BYTES_A_S = 5e6
_TAIL_BYTES = 1 << 16
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "SYSTEMROOT", "TMPDIR", "LANG", "LC_ALL", "VIRTUAL_ENV")


class PickledCheckpoint:
    """A directory with pickled weights, none of which has been opened yet.

    Args:
        path: the directory.
        files: the pickles.
        weight_map: from tensor names to file names; None for a single file.
    """

    def __init__(self, path: Path, files: tuple[Path, ...], weight_map: dict[str, str] | None) -> None:
        self.path = path
        self._files = files
        self._weight_map = weight_map

    @classmethod
    def open(cls, path: Path) -> PickledCheckpoint:
        """Find the pickles of the directory `path`.

        Raises:
            ModelNotFound: no such directory.
            CheckpointError: it has none, or has safetensors, which are read without any pickle.
        """
        if not path.is_dir():
            raise ModelNotFound(f"there is no checkpoint directory {path}")
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(why_no_config(path))
        if (path / PICKLED_FILE).is_file():
            return cls(path, (path / PICKLED_FILE,), None)
        if (path / PICKLED_INDEX).is_file():
            weight_map = read_weight_map(path / PICKLED_INDEX)
            return cls(path, tuple(path / name for name in sorted(set(weight_map.values()))), weight_map)
        raise CheckpointError(f"{path} has neither {PICKLED_FILE} nor {PICKLED_INDEX}, so there is no pickle to allow")

    @property
    def fingerprint(self) -> str:
        """Differs for another model in the same place, and after any of the files was written again."""
        return fingerprint_of(self.path, self._digests())

    @contextmanager
    def converted(
        self, place: Path, progress: Progress, *, expand_to: str | None = None
    ) -> Iterator[DirectoryCheckpoint]:
        """The checkpoint with its pickles converted, for as long as the ``with`` block lasts.

        Args:
            place: a directory for the converted files, as large as the pickles; made here, and removed afterwards.
            progress: told of phase ``convert``, file by file.
            expand_to: see `DirectoryCheckpoint`.

        Raises:
            CheckpointError: a pickle holds anything but tensors, is damaged, or takes longer than its size explains.
            DiskFull: there is no room; said before a pickle is opened.
        """
        shutil.rmtree(place, ignore_errors=True)  # left by a process that was killed
        place.mkdir(parents=True)
        try:
            self._check_room(place)
            self._convert_all(place, progress)
            _, tensors = find_weights(place)
            yield DirectoryCheckpoint(self.path, self._digests(), tensors, expand_to)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _digests(self) -> WeightFiles:
        """Each file with a digest of its end, where an archive keeps the checksums of all that is in it."""
        return tuple((file, _digest_of_end(file)) for file in self._files)

    def _check_room(self, place: Path) -> None:
        needed, free = sum(file.stat().st_size for file in self._files), shutil.disk_usage(place).free
        if needed > free:
            raise DiskFull(
                f"converting the pickles of {self.path} needs {needed:,} bytes in {place.parent}, where {free:,} are "
                "free; the shards need about as much again. Free some space, or name another store",
                needed,
                free,
            )

    def _convert_all(self, place: Path, progress: Progress) -> None:
        total, done = sum(file.stat().st_size for file in self._files), 0
        progress(CONVERT, done, total)
        names = {}
        for number, file in enumerate(self._files):
            names[file.name] = SINGLE_FILE if self._weight_map is None else f"part-{number:05d}.safetensors"
            _convert(file, place / names[file.name])
            done += file.stat().st_size
            progress(CONVERT, done, total)
        if self._weight_map is not None:
            renamed = {tensor: names[file] for tensor, file in self._weight_map.items()}
            (place / INDEX_FILE).write_text(json.dumps({"weight_map": renamed}), encoding="utf-8")


def _convert(source: Path, target: Path) -> None:
    request = {"source": str(source.resolve()), "target": str(target), "dtypes": dict(FILE_DTYPES)}
    limit_s = START_S + source.stat().st_size / SLOWEST_BYTES_A_S
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        process = subprocess.run(
            # -P: the script's directory is no place to import from; its modules have names of the standard library.
            [sys.executable, "-P", str(Path(unpickle.__file__))],
            input=json.dumps(request), capture_output=True, text=True, timeout=limit_s, env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{source} was not converted within {limit_s:.0f} s, and was given up") from error
    answer = _answer(process.stdout)
    if process.returncode or answer is None:
        last = (process.stderr.strip().splitlines() or ["without a word"])[-1][:200]
        raise CheckpointError(
            f"{source} ended the process that converted it (status {process.returncode}: {last}); fetch the file "
            "again, or use a checkpoint with safetensors"
        )
    if "error" in answer:
        raise CheckpointError(f"{source}: {answer['error']}. Use a checkpoint with safetensors, or fetch it again")
    logger.info("converted %s: %s tensors", source.name, answer.get("tensors"))


def _answer(text: str) -> dict[str, object] | None:
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _digest_of_end(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            return hashlib.sha256(opened.read()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
