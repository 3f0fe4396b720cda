"""Pins this process to one GPU or to the CPU, before torch is imported.

Owns the choice and ``CUDA_VISIBLE_DEVICES``; asks ``nvidia-smi``, never torch, which may be loaded only afterwards. A
lock file for each GPU, held while the worker lives, lets ``auto`` see what other workers of this host hold. A
``CUDA_VISIBLE_DEVICES`` that is set already restricts the choice and renumbers it, as it does for CUDA.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from lamella.errors import ConfigError

log = logging.getLogger(__name__)

NVIDIA_SMI_TIMEOUT_S = 20.0
_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.free,memory.total", "--format=csv,noheader,nounits")
_SIZE = r"(\d+|\[[^,]*\])"
_LISTED = re.compile(rf"\s*(\d+)\s*,\s*([\w-]+)\s*,\s*(.+?)\s*,\s*{_SIZE}\s*(?:,\s*{_SIZE}\s*)?")


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver lists it; `visible` is the word that names it in CUDA_VISIBLE_DEVICES."""

    index: int
    uuid: str
    name: str
    free_bytes: int
    visible: str
    total_bytes: int = 0


@dataclass
class PinnedDevice:
    """What this process may see from now on.

    Attributes:
        engine_device: what the engine is told: ``cpu`` or ``cuda:0``.
        label: what the device is to people, such as ``cuda:1 (NVIDIA GeForce GTX 1070)``.
        short: the same in one word, for names: ``cpu`` or ``cuda1``.
        why: how it was chosen.
        memory_bytes: a GPU's memory in all; None for the CPU, or where the driver does not tell.
    """

    engine_device: str
    label: str
    short: str
    why: str
    _lock: IO[str] | None = None
    memory_bytes: int | None = None

    def release(self) -> None:
        """Let other workers choose the GPU; idempotent, and the end of the process does it too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def pin_device(
    wanted: str,
    environ: MutableMapping[str, str] | None = None,
    list_gpus: Callable[[], tuple[tuple[Gpu, ...], str]] | None = None,
    runtime_dir: Path | None = None,
) -> PinnedDevice:
    """Restrict this process to `wanted` (``cpu``, ``cuda:N`` or ``auto``) by setting `environ`.

    `list_gpus` returns the host's GPUs, and why there are none where there are none; `runtime_dir` holds the lock
    files. Both have defaults that fit the host.

    Raises:
        ConfigError: the GPU asked for does not exist here.
    """
    env = os.environ if environ is None else environ
    if wanted == "cpu":
        return _pin_cpu(env, "as asked")
    found, why_none = (list_gpus or query_gpus)()
    allowed = env.get("CUDA_VISIBLE_DEVICES")
    gpus = found if allowed is None else _restrict(found, allowed)
    locks = runtime_dir or default_runtime_dir()
    if wanted == "auto":
        return _pin_best(env, gpus, why_none if not found else "CUDA_VISIBLE_DEVICES leaves none", locks)
    number = int(wanted.removeprefix("cuda:"))
    if number >= len(gpus):
        raise ConfigError(_no_such_gpu(number, gpus, allowed, why_none))
    lock, is_free = _take_lock(locks, gpus[number])
    if not is_free:
        log.warning("%s is held by another worker of this host too; they will share its memory", wanted)
    return _pin_gpu(env, gpus[number], number, "as asked", lock)


def query_gpus() -> tuple[tuple[Gpu, ...], str]:
    """Ask nvidia-smi for the host's GPUs; the text says why where there are none."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return (), "nvidia-smi is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"nvidia-smi does not answer ({error})"
    if answer.returncode != 0:
        said = (answer.stdout + answer.stderr).strip().splitlines()
        return (), f"nvidia-smi failed: {said[0] if said else f'exit code {answer.returncode}'}"
    gpus = parse_gpus(answer.stdout)
    return gpus, "" if gpus else "nvidia-smi lists no GPU"


def parse_gpus(listing: str) -> tuple[Gpu, ...]:
    """Read nvidia-smi's lines of index, uuid, name, free and total MiB; a line that is not of that form is left out."""
    gpus = []
    for line in listing.splitlines():
        match = _LISTED.fullmatch(line)
        if match:
            index, uuid, name, *sizes = match.groups()
            free, total = (int(each) * 2**20 if each and each.isdigit() else 0 for each in sizes)  # some say [N/A]
            gpus.append(Gpu(int(index), uuid, name, free, index, total))
    return tuple(gpus)


def default_runtime_dir() -> Path:
    """Where lock files live: private to this user, gone or stale after a reboot."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "lamella" if base else Path(tempfile.gettempdir()) / f"lamella-{os.getuid()}"


def _restrict(gpus: tuple[Gpu, ...], allowed: str) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, in its order; like CUDA, stop at the first unknown word."""
    chosen: list[Gpu] = []
    for word in (part.strip() for part in allowed.split(",")):
        match = [g for g in gpus if word == str(g.index) or (len(word) > 4 and g.uuid.startswith(word))]
        if len(match) != 1:
            break
        gpu = match[0]
        chosen.append(replace(gpu, visible=word))
    return tuple(chosen)


def _pin_cpu(env: MutableMapping[str, str], why: str) -> PinnedDevice:
    env["CUDA_VISIBLE_DEVICES"] = ""
    return PinnedDevice("cpu", "cpu", "cpu", why)


def _pin_gpu(env: MutableMapping[str, str], gpu: Gpu, number: int, why: str, lock: IO[str] | None) -> PinnedDevice:
    env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's order; CUDA's own is fastest first
    env["CUDA_VISIBLE_DEVICES"] = gpu.visible
    label = f"cuda:{number} ({gpu.name})"
    return PinnedDevice("cuda:0", label, f"cuda{number}", why, lock, gpu.total_bytes or None)


def _pin_best(env: MutableMapping[str, str], gpus: tuple[Gpu, ...], why_none: str, locks: Path) -> PinnedDevice:
    if not gpus:
        return _pin_cpu(env, f"auto: no GPU, {why_none}")
    if _torch_is_for_cpu():
        return _pin_cpu(env, f"auto: {len(gpus)} GPUs, but the installed torch is a build for the CPU")
    for number, gpu in sorted(enumerate(gpus), key=lambda item: -item[1].free_bytes):
        lock, is_free = _take_lock(locks, gpu)
        if is_free:
            free_gib = gpu.free_bytes / 2**30
            return _pin_gpu(env, gpu, number, f"auto: of the free GPUs it has most memory, {free_gib:.1f} GiB", lock)
    return _pin_cpu(env, f"auto: other workers hold all {len(gpus)} GPUs")


def _torch_is_for_cpu() -> bool:
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _take_lock(directory: Path, gpu: Gpu) -> tuple[IO[str] | None, bool]:
    """Hold the GPU's lock file if nobody does; (lock, True), or (None, False) where another worker holds it.

    Where no lock file can be had at all, the GPU counts as free: a lock only steers ``auto``.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            log.warning("%s belongs to another user, so GPUs are not locked", directory)
            return None, True
        lock = (directory / f"gpu-{gpu.uuid}.lock").open("a", encoding="utf-8")
    except OSError as error:
        log.warning("GPUs are not locked: %s", error)
        return None, True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None, False
    return lock, True


def _no_such_gpu(number: int, gpus: tuple[Gpu, ...], allowed: str | None, why_none: str) -> str:
    if why_none:
        return f"cuda:{number} does not exist here: {why_none}. Use --device cpu, or install the NVIDIA driver."
    restricted = "" if allowed is None else f" (CUDA_VISIBLE_DEVICES={allowed} leaves {len(gpus)})"
    have = ", ".join(f"cuda:{n} ({gpu.name})" for n, gpu in enumerate(gpus)) or "no GPU"
    return f"cuda:{number} does not exist here{restricted}: this process may see {have}. Use one of them, or cpu."
