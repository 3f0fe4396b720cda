"""Which device the engine computes on, and what is known of its memory and the host's."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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
    return available_host_bytes()


def release_library_memory() -> None:
    """Give back what matrix libraries keep on GPUs, a workspace for every thread and stream that ever used them."""
    # Without this each stream holds up to 32 MiB for the life of the process; the next product takes its own again.
    torch._C._cuda_clearCublasWorkspaces()


def total_memory_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes of memory that `device` has for this process at most: the GPU's, or the host's within its memory limits.

    Args:
        device: a GPU, or the CPU for the host.
        root: directory that ``/proc`` and the control groups are looked up under.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(total * torch.cuda.memory.get_per_process_memory_fraction(device))
    limits = [limit for group in _memory_groups(root) if (limit := _limit_of(group)) is not None]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process can still take without anyone being killed for it.

    The least of what the kernel calls available and what each memory limit of this process's control groups (version 1
    or 2, up to the outermost that can be seen) leaves; file cache counts as free in both, since it gives way. Where the
    kernel gives no such figure (macOS): half of the physical memory.

    Args:
        root: directory that ``/proc`` and the control groups are looked up under.
    """
    # Free pages would leave out the file cache, which the streamed shards fill and which gives way.
    available = _proc_bytes(root / "proc/meminfo", "MemAvailable:")
    if available is None:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    rooms = [room for group in _memory_groups(root) if (room := _room_in(group)) is not None]
    return max(0, min([available, *rooms]))


def peak_rss_bytes() -> int:
    """The most memory this process has had resident so far."""
    # Resource usage would count what the parent had when it forked, too.
    if (high_water := _proc_bytes(Path("/proc/self/status"), "VmHWM:")) is not None:
        return high_water
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _MemoryGroup(NamedTuple):
    """Files of one control group: those that limit it, what it uses, and the fields of its statistics that give way."""

    directory: Path
    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]


def _memory_groups(root: Path) -> Iterator[_MemoryGroup]:
    """The control groups that limit this process's memory, from its own up to the mount of the hierarchy."""
    paths = dict(_cgroup_paths(root))
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, source = line.partition(" - ")
        words, kind = fields.split(), source.split()
        if len(words) < 5 or len(kind) < 3:
            continue
        is_second_version = kind[0] == "cgroup2"
        if not is_second_version and not (kind[0] == "cgroup" and "memory" in kind[2].split(",")):
            continue
        mount = root / words[4].lstrip("/")
        path = paths.get("" if is_second_version else "memory", "/")
        for directory in _up_to(mount, _inside(path, words[3])):
            if is_second_version:
                yield _MemoryGroup(
                    directory, ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")
                )
            else:
                yield _MemoryGroup(
                    directory,
                    ("memory.limit_in_bytes",),
                    "memory.usage_in_bytes",
                    ("total_inactive_file", "total_active_file"),
                )


def _cgroup_paths(root: Path) -> Iterator[tuple[str, str]]:
    """Controller ("" for version 2) and path of each control group of this process."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            yield controller, path


def _inside(path: str, mount_root: str) -> str:
    """`path` relative to a mount that shows the hierarchy from `mount_root` on; "" if it is not in there."""
    if mount_root != "/" and path != mount_root and not path.startswith(mount_root + "/"):
        return ""
    inside = path if mount_root == "/" else path[len(mount_root) :]
    return "" if ".." in inside.split("/") else inside.strip("/")


def _up_to(mount: Path, inside: str) -> Iterator[Path]:
    directory = mount / inside
    while directory != mount:
        yield directory
        directory = directory.parent
    yield mount


def _room_in(group: _MemoryGroup) -> int | None:
    """Bytes that a control group leaves, or None if it sets no limit."""
    limit, usage = _limit_of(group), _number(group.directory / group.usage)
    if limit is None or usage is None:
        return None
    fields = _statistics(group)
    gives_way = sum(int(fields.get(name, 0)) for name in group.reclaimable)
    return max(0, limit - max(0, usage - gives_way))


def _limit_of(group: _MemoryGroup) -> int | None:
    """Bytes that the processes of a control group may have, or None if it sets no limit."""
    limits = [limit for name in group.limits if (limit := _number(group.directory / name)) is not None]
    if not limits:
        return None
    # A limit further out, beyond what this process can see, shows only here (version 1).
    return min([*limits, int(_statistics(group).get("hierarchical_memory_limit", limits[0]))])


def _statistics(group: _MemoryGroup) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in _lines(group.directory / "memory.stat") if " " in line)


def _number(path: Path) -> int | None:
    """The number in a one-line file; None if there is none, or it says "max"."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _proc_bytes(path: Path, field: str) -> int | None:
    """A field of a file under /proc that is given in kB; None where there is no such file or field."""
    values = [line.split()[1] for line in _lines(path) if line.startswith(field)]
    return int(values[0]) * 1024 if values else None
