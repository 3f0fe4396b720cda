"""How much host memory may be taken: the kernel's figure, or less where a control group sets a limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lamella_engine.device import available_host_bytes, free_memory_bytes, total_memory_bytes

GIB = 1 << 30
V2_MOUNT = "35 24 0:30 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
OTHER_MOUNTS = (
    "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n31 23 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
)


class Host:
    """A directory that looks like a host's root with 16 GiB available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {32 << 20} kB\nMemFree: 1024 kB\nMemAvailable: {16 << 20} kB\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def in_v2_group(self, path: str, mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{path}\n")
        self.write("proc/self/mountinfo", OTHER_MOUNTS + V2_MOUNT.format(root=mount_root))

    def in_v1_group(self, path: str, mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"9:name=systemd:/\n4:memory:{path}\n3:cpu,cpuacct:/elsewhere\n0::/\n")
        self.write("proc/self/mountinfo", OTHER_MOUNTS + V1_MOUNT.format(root=mount_root))

    def v2(self, group: str, limit: str, used: int, file_cache: int = 0, high: str = "max") -> None:
        base = f"sys/fs/cgroup/{group}"
        self.write(f"{base}/memory.max", f"{limit}\n")
        self.write(f"{base}/memory.high", f"{high}\n")
        self.write(f"{base}/memory.current", f"{used}\n")
        half = file_cache // 2
        self.write(f"{base}/memory.stat", f"anon 77\nshmem 4096\nactive_file {half}\ninactive_file {half}\n")

    def v1(self, group: str, limit: int, used: int, file_cache: int = 0, outer: int | None = None) -> None:
        base = f"sys/fs/cgroup/memory/{group}"
        self.write(f"{base}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{base}/memory.usage_in_bytes", f"{used}\n")
        stat = f"inactive_file 1\ntotal_inactive_file {file_cache}\ntotal_active_file 0\n"
        self.write(f"{base}/memory.stat", stat + (f"hierarchical_memory_limit {outer}\n" if outer else ""))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_without_control_groups_the_kernels_figure_counts(host: Host) -> None:
    assert available_host_bytes(host.root) == 16 * GIB


@pytest.mark.parametrize("file_cache", [0, GIB])
def test_a_v2_limit_less_what_is_used_but_for_file_cache(host: Host, file_cache: int) -> None:
    host.in_v2_group("/")
    host.v2("", str(8 * GIB), 3 * GIB, file_cache)

    assert available_host_bytes(host.root) == 5 * GIB + file_cache


def test_the_tightest_group_of_the_branch_counts(host: Host) -> None:
    host.in_v2_group("/kube/pod/box")
    host.v2("kube/pod/box", "max", GIB)
    host.v2("kube/pod", str(4 * GIB), 3 * GIB)
    host.v2("kube", str(64 * GIB), 40 * GIB)
    host.v2("kube/pod/other", str(GIB), GIB)

    assert available_host_bytes(host.root) == GIB


def test_the_v2_throttling_limit_counts_too(host: Host) -> None:
    host.in_v2_group("/unit")
    host.v2("unit", str(8 * GIB), GIB, high=str(2 * GIB))

    assert available_host_bytes(host.root) == GIB


def test_a_group_over_its_limit_leaves_nothing(host: Host) -> None:
    host.in_v2_group("/unit")
    host.v2("unit", str(GIB), 2 * GIB)

    assert available_host_bytes(host.root) == 0


def test_a_limit_above_the_host_changes_nothing(host: Host) -> None:
    host.in_v1_group("/box")
    host.v1("box", 9223372036854771712, GIB, outer=9223372036854771712)

    assert available_host_bytes(host.root) == 16 * GIB


def test_a_v1_limit_less_what_is_used_but_for_file_cache(host: Host) -> None:
    host.in_v1_group("/box")
    host.v1("box", 8 * GIB, 7 * GIB, 2 * GIB)

    assert available_host_bytes(host.root) == 3 * GIB


def test_a_v1_limit_of_a_group_that_cannot_be_seen_counts(host: Host) -> None:
    host.in_v1_group("/docker/abc", mount_root="/docker/abc")
    host.v1("", 9223372036854771712, GIB, outer=4 * GIB)

    assert available_host_bytes(host.root) == 3 * GIB


@pytest.mark.parametrize(
    ("path", "mount_root", "group"),
    [
        ("/docker/abc", "/docker/abc", ""),
        ("/docker/abc/inner", "/docker/abc", "inner"),
        ("/elsewhere", "/docker/abc", ""),
        ("/../sibling", "/", ""),
        ("/docker/abcdef", "/docker/abc", ""),
    ],
)
def test_a_mount_that_shows_a_part_of_the_tree(host: Host, path: str, mount_root: str, group: str) -> None:
    host.in_v2_group(path, mount_root)
    host.v2(group, str(2 * GIB), GIB)

    assert available_host_bytes(host.root) == GIB


def test_files_that_make_no_sense_are_passed_over(host: Host) -> None:
    host.in_v2_group("/unit")
    host.write("proc/self/mountinfo", "nonsense\n\n35 24 - cgroup2\n" + V2_MOUNT.format(root="/"))
    host.write("sys/fs/cgroup/unit/memory.max", "")
    host.write("sys/fs/cgroup/unit/memory.current", "many\n")

    assert available_host_bytes(host.root) == 16 * GIB


def test_a_system_without_proc_gets_half_of_its_memory(tmp_path: Path) -> None:
    assert 0 < available_host_bytes(tmp_path) < 1 << 50


def test_the_cpu_has_the_hosts_memory() -> None:
    assert 0 < free_memory_bytes(torch.device("cpu")) <= 1 << 50


def test_a_share_of_the_memory_is_one_of_the_control_groups_limit(host: Host) -> None:
    host.in_v2_group("/job")
    host.v2("job", limit=str(1 * GIB), used=0)

    assert total_memory_bytes(torch.device("cpu"), host.root) == 1 * GIB
