"""Where a benchmark ran: processor, memory, GPU, the disk under the files, and the versions of everything."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = ("lamella", "torch", "transformers", "accelerate", "airllm", "safetensors", "numpy")


def machine_facts(path: Path, device: str) -> dict[str, Any]:
    """Everything about this machine that a figure depends on; `path` lies on the disk in question."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu": _gpu(device),
        "disk": _mount(path),
        "system": f"{platform.system()} {platform.release()}",
        "versions": _versions(),
    }


class Bystanders:
    """How many cores other programs keep busy from its making on: a figure taken beside a busy one is no figure."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy_s, self._own_s = _busy_seconds(), _own_seconds()

    def busy_cores(self) -> float | None:
        """Cores that anyone but this process and its ended children used; None where the system does not tell."""
        busy_s = _busy_seconds()
        if busy_s is None or self._busy_s is None:
            return None
        others_s = busy_s - self._busy_s - (_own_seconds() - self._own_s)
        return round(max(0.0, others_s) / max(1e-3, time.monotonic() - self._began), 2)


def process_busy_s(pid: int) -> float:
    """Processor seconds that a process has used so far, itself and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes() -> int | None:
    """The most memory this process has had resident so far; None where the system does not tell."""
    value = proc_field("/proc/self/status", "VmHWM")
    return int(value.split()[0]) * 1024 if value else None


def _busy_seconds() -> float | None:
    """Seconds that all cores together have worked since the system started, for anyone, or were taken by its host."""
    for line in proc_lines("/proc/stat"):
        name, *ticks = line.split()
        if name == "cpu" and len(ticks) >= 8:
            user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, ticks[:8])
            busy = user + nice + system + interrupts + soft_interrupts + stolen
            return busy / os.sysconf("SC_CLK_TCK")
    return None


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _gpu(device: str) -> str | None:
    """The GPU's name, memory, driver and bus, asked of the driver's tool so that no CUDA context is made here."""
    if not device.startswith("cuda"):
        return None
    fields = "name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max"
    index = device.partition(":")[2] or "0"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={index}"]
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown: nvidia-smi does not answer"
    return outcome.stdout.strip() or f"unknown: {outcome.stderr.strip()[:200]}"


def _mount(path: Path) -> dict[str, str | None]:
    """The file system `path` lies on, by the longest mount point that leads to it."""
    target, best = str(path.resolve()), ("", "unknown", "unknown")
    for line in proc_lines("/proc/self/mounts"):
        source, point, kind = line.split()[:3]
        is_above = target == point or target.startswith(point.rstrip("/") + "/")
        if is_above and len(point) >= len(best[0]):
            best = (point, kind, source)
    number = os.stat(path).st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    name = block.resolve().name if block.exists() else None
    return {"mount": best[0], "file_system": best[1], "source": best[2], "block_device": name}


def proc_field(path: str, name: str) -> str | None:
    """The value behind ``name:`` in a file of such lines; None if there is no such file or line."""
    for line in proc_lines(path):
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def proc_lines(path: str) -> list[str]:
    """The lines of a file; none where it cannot be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
