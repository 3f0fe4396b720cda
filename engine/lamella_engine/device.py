"""Which device the engine computes on, and what is known of its memory."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from lamella_engine.errors import DeviceError


def resolve_device(name: str) -> torch.device:
    """The torch device for ``cpu``, ``cuda``, ``cuda:N`` or ``auto`` (the first GPU, else the CPU).

    Raises:
        DeviceError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise DeviceError(f"{name!r} is not a device; use cpu, cuda, cuda:0, cuda:1, ... or auto")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(index or 0)
    if number >= count:
        raise DeviceError(
            f"there is no device {name!r}: torch {torch.__version__} sees {count} CUDA device(s) here. "
            "Use --device cpu, or install a torch build that matches the driver (`lamella doctor` tells)."
        )
    return torch.device("cuda", number)


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on `device`: GPU memory free and within this process's share, or available RAM."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = int(total * torch.cuda.memory.get_per_process_memory_fraction(device))
        return min(int(free), share - torch.cuda.memory_reserved(device))
    # Free pages would leave out the file cache, which the streamed shards fill and which gives way.
    available = _proc_bytes("/proc/meminfo", "MemAvailable:")
    return available or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """The most memory this process has had resident so far."""
    # Resource usage would count what the parent had when it forked, too.
    if (high_water := _proc_bytes("/proc/self/status", "VmHWM:")) is not None:
        return high_water
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _proc_bytes(path: str, field: str) -> int | None:
    """A field of a file under /proc that is given in kB; None where there is no such file or field."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(field)]
    return int(values[0]) * 1024 if values else None
