"""Who has a model of the store open, and when it was last opened: one small file a model, locked while it is in use.

Any number of processes hold it together; the kernel lets go when they end. `open_model` holds it for an engine,
`shard_store` while it builds from a stored model; `store_room` looks at it before it removes anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lamella_engine.names import directory_name

logger = logging.getLogger(__name__)

LOCKS_DIRECTORY = ".locks"
_SHARE_WAIT_S = 60.0
_LOOK_S = 0.05


@contextlib.contextmanager
def using(store: Path, name: str) -> Iterator[None]:
    """Keep the model `name` from being removed for room inside a ``with``, and note that it was used now.

    The file stays when the model goes: one that came and went would be two files with a lock each.

    A store that cannot be written to cannot be told; its models are then not protected, and a log line says so.
    """
    with contextlib.ExitStack() as resources:
        try:
            file = resources.enter_context(_opened(store, name))
            _share(file)
            os.utime(file)
        except OSError as error:
            logger.info("nobody can see that %s is in use: %s", name, error)
        yield


@contextlib.contextmanager
def unused(store: Path, name: str) -> Iterator[bool]:
    """Whether nobody has the model open; if so, nobody can open it inside the ``with``."""
    with _opened(store, name) as file:
        yield _is_free(file)


def is_in_use(store: Path, name: str) -> bool:
    """Whether a process has the model open; changes nothing."""
    try:
        file = os.open(_path(store, name), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _is_free(file)
    finally:
        os.close(file)


def last_used_s(store: Path, name: str) -> float:
    """When the model was last opened, in Unix seconds; 0 if it never was."""
    try:
        return _path(store, name).stat().st_mtime
    except OSError:
        return 0.0


def _share(file: int) -> None:
    """Wait for whoever is just removing the model."""
    deadline = time.monotonic() + _SHARE_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        else:
            return
        time.sleep(_LOOK_S)


def _is_free(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _path(store: Path, name: str) -> Path:
    return store / LOCKS_DIRECTORY / f"{directory_name(name)}.use"


@contextlib.contextmanager
def _opened(store: Path, name: str) -> Iterator[int]:
    path = _path(store, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
