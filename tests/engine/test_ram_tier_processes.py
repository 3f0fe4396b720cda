"""The RAM tier between processes: one copy, filled once, whoever is killed when, and never a SIGBUS."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella_engine.ram_tier import RamTier
from lamella_engine.shared_memory import reclaim
from tests.engine.ram_tier_process import TierProcess, tier_process
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is shared on Linux")

KEY = "e" * 64 + "-4096-1000000"
NBYTES = 1_000_000


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def first(directory: Path) -> Iterator[TierProcess]:
    with tier_process(directory) as process:
        yield process


@pytest.fixture
def second(directory: Path) -> Iterator[TierProcess]:
    with tier_process(directory) as process:
        yield process


def proportional_bytes(pid: int, path: Path) -> int:
    """What the kernel charges the process `pid` for its mapping of `path`: each page divided by its users."""
    maps = Path(f"/proc/{pid}/smaps").read_text().split(str(path))[1]
    return next(int(line.split()[1]) * 1024 for line in maps.splitlines() if line.startswith("Pss:"))


def test_two_processes_at_once_fill_once_and_share_the_pages(
    first: TierProcess, second: TierProcess, directory: Path
) -> None:
    first.tell("load", KEY, NBYTES, 1)
    second.tell("load", KEY, NBYTES, 1)

    answers = [first.answer(), second.answer()]
    filler = answers.index(["filling"])
    answers[filler] = (first, second)[filler].answer()
    first.ask("poke", KEY, NBYTES - 1, 77)

    assert answers == [["loaded", [1]], ["loaded", [1]]]
    assert second.ask("peek", KEY, NBYTES - 1) == [77]
    assert first.ask("shared") == [NBYTES, NBYTES, []]
    charged = [proportional_bytes(process.pid, directory / KEY) for process in (first, second)]
    assert sum(charged) <= NBYTES + 3 * 4096


def test_the_last_to_close_removes_the_file(first: TierProcess, second: TierProcess) -> None:
    assert first.ask("load", KEY, NBYTES, 1) == ["filling"]
    assert first.answer() == ["loaded", [1]]
    assert second.ask("load", KEY, NBYTES, 2) == ["loaded", [1]]

    assert first.ask("close") == ["closed", [KEY]]
    assert second.ask("peek", KEY, 0) == [1]
    assert second.ask("close") == ["closed", []]


def test_another_waits_while_one_fills(first: TierProcess, second: TierProcess) -> None:
    assert first.ask("load", KEY, NBYTES, 1, True) == ["filling"]
    second.tell("load", KEY, NBYTES, 2)
    with pytest.raises(AssertionError, match="no answer"):
        second.answer(0.3)

    first.tell("go on")

    assert first.answer() == ["loaded", [1]]
    assert second.answer() == ["loaded", [1]]


def test_a_filler_killed_half_way_is_followed_by_the_one_who_waits(
    first: TierProcess, second: TierProcess, directory: Path
) -> None:
    assert first.ask("load", KEY, NBYTES, 1, True) == ["filling"]
    second.tell("load", KEY, NBYTES, 2)

    first.kill()

    assert second.answer() == ["filling"]
    assert second.answer() == ["loaded", [2]]
    assert second.ask("close") == ["closed", []]
    assert os.listdir(directory) == []


def test_what_a_killed_filler_left_is_no_piece_and_is_reclaimed(first: TierProcess, directory: Path) -> None:
    assert first.ask("load", KEY, NBYTES, 1, True) == ["filling"]
    with RamTier(directory, pinned=False) as tier:
        assert tier.held_bytes([KEY]) == 0
        assert os.listdir(directory) == [f"{KEY}.part"]

        first.kill()

        assert reclaim(directory) >= NBYTES
        assert os.listdir(directory) == []


def test_the_file_of_a_killed_holder_is_removed_by_the_next_to_open(first: TierProcess, directory: Path) -> None:
    assert first.ask("load", KEY, NBYTES, 1) == ["filling"]
    assert first.answer() == ["loaded", [1]]
    assert reclaim(directory) == 0

    first.kill()

    assert os.listdir(directory) == [KEY]
    with RamTier(directory, pinned=False):
        assert os.listdir(directory) == []


def test_a_holder_killed_beside_another_leaves_the_file_to_it(
    first: TierProcess, second: TierProcess, directory: Path
) -> None:
    assert first.ask("load", KEY, NBYTES, 1) == ["filling"]
    assert first.answer() == ["loaded", [1]]
    assert second.ask("load", KEY, NBYTES, 2) == ["loaded", [1]]

    first.kill()

    assert reclaim(directory) == 0
    assert second.ask("peek", KEY, NBYTES - 1) == [1]
    assert second.ask("close") == ["closed", []]


def test_a_frozen_filler_is_not_waited_for_for_ever(first: TierProcess, directory: Path) -> None:
    assert first.ask("load", KEY, NBYTES, 1, True) == ["filling"]
    first.send(signal.SIGSTOP)

    with tier_process(directory, wait_s=0.5) as impatient:
        impatient.tell("load", KEY, NBYTES, 2)

        assert impatient.answer() == ["filling"]
        assert impatient.answer() == ["loaded", [2]]
        nbytes, shared, warnings = impatient.ask("shared")
        assert (nbytes, shared) == (NBYTES, 0)
        assert f"process {first.pid} has been filling" in str(warnings)

    first.send(signal.SIGCONT)
    first.tell("go on")
    assert first.answer() == ["loaded", [1]]


def test_pieces_above_the_file_size_limit_are_held_privately(first: TierProcess, directory: Path) -> None:
    small = "f" * 64
    assert first.ask("limit", 500_000) == ["limited"]

    assert first.ask("load", KEY, NBYTES, 1) == ["filling"]
    assert first.answer() == ["loaded", [1]]
    assert first.ask("load", small, 400_000, 2) == ["filling"]
    assert first.answer() == ["loaded", [2]]

    nbytes, shared, warnings = first.ask("shared")
    assert (nbytes, shared) == (NBYTES + 400_000, 400_000)
    assert "no room for 1,000,000 bytes" in str(warnings)
    assert os.listdir(directory) == [small]


def test_a_memory_file_system_that_is_full_means_private_memory(tmp_path: Path) -> None:
    probe = ("unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt")
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("private mounts are not permitted here")
    mount = f"mount -t tmpfs -o size=1500k none '{tmp_path}' && exec \"$@\""
    wrapper = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")

    with tier_process(tmp_path / "shared", wrapper=wrapper) as process:
        for number in range(2):
            assert process.ask("load", f"{number}{KEY}", NBYTES, number) == ["filling"]
            assert process.answer() == ["loaded", [number]]

        nbytes, shared, warnings = process.ask("shared")
        assert (nbytes, shared) == (2 * NBYTES, NBYTES)
        assert "No space left" in str(warnings)
        assert "--shm-size" in str(warnings)
        assert process.ask("close") == ["closed", []]


def test_what_a_process_that_just_exits_held_is_free_at_once(first: TierProcess, directory: Path) -> None:
    assert first.ask("load", KEY, NBYTES, 1) == ["filling"]
    assert first.answer() == ["loaded", [1]]

    first.send(signal.SIGTERM)

    wait_until(lambda: reclaim(directory))
    assert os.listdir(directory) == []
