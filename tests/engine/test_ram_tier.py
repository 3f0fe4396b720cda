"""The RAM tier in one process: pieces are exact and held once, nothing is left behind, and every failure is clean."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lamella_engine import ShardStore
from lamella_engine.errors import DeviceError, EngineClosed
from lamella_engine.pieces import layer_piece
from lamella_engine.ram_tier import RamTier
from lamella_engine.shared_memory import default_directory, reclaim
from tests import tiny_models
from tests.descriptors import open_files_below
from tests.waiting import wait_until

linux_only = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory is shared on Linux")
KEY = "a" * 64 + "-4096-10001"
NBYTES = 10_001
SHAPE: dict[str, object] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Filler:
    """Fills with one byte and counts how often."""

    def __init__(self, byte: int = 7) -> None:
        self.byte = byte
        self.calls = 0

    def __call__(self, view: memoryview) -> None:
        self.calls += 1
        view[:] = bytes([self.byte]) * len(view)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def tier(directory: Path) -> Iterator[RamTier]:
    with RamTier(directory, pinned=False) as tier:
        yield tier


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@linux_only
def test_a_piece_is_exact_page_aligned_and_filled_once(tier: RamTier, directory: Path) -> None:
    fill = Filler()

    tensor = tier.load(KEY, NBYTES, fill)
    again = tier.load(KEY, NBYTES, fill)

    assert (tensor.dtype, tuple(tensor.shape), tensor.data_ptr() % 4096) == (torch.uint8, (NBYTES,), 0)
    assert set(tensor.tolist()) == {7}
    assert (again.data_ptr(), fill.calls) == (tensor.data_ptr(), 1)
    assert (tier.nbytes, tier.shared_bytes) == (NBYTES, NBYTES)
    assert [path.name for path in directory.iterdir()] == [KEY]
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / KEY).stat().st_mode & 0o777 == 0o600


@linux_only
def test_two_tiers_share_the_bytes_and_the_last_to_close_removes_them(tier: RamTier, directory: Path) -> None:
    fill = Filler()
    first = tier.load(KEY, NBYTES, fill)
    other = RamTier(directory, pinned=False)
    second = other.load(KEY, NBYTES, fill)

    first[5] = 99
    tier.close()
    left_after_one = os.listdir(directory)
    other.close()

    assert (int(second[5]), fill.calls) == (99, 1)
    assert left_after_one == [KEY]
    assert os.listdir(directory) == []


@linux_only
def test_a_tensor_outlives_the_tier_and_its_memory_goes_with_it(directory: Path) -> None:
    tier = RamTier(directory, pinned=False)
    tensor = tier.load(KEY, NBYTES, Filler())
    part = tensor[4096:].view(-1, 5)

    tier.close()
    tier.close()
    del tensor
    gc.collect()

    assert set(part.flatten().tolist()) == {7}
    assert is_mapped(directory / KEY)
    del part
    gc.collect()
    assert not is_mapped(directory / KEY)


def test_use_after_close_is_an_error(tier: RamTier) -> None:
    tier.close()

    with pytest.raises(EngineClosed, match="after close"):
        tier.load(KEY, NBYTES, Filler())


@linux_only
def test_a_failing_fill_leaves_nothing_and_can_be_repeated(tier: RamTier, directory: Path) -> None:
    def fail(view: memoryview) -> None:
        view[:100] = b"x" * 100
        raise OSError(5, "the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        tier.load(KEY, NBYTES, fail)

    assert os.listdir(directory) == []
    assert tier.nbytes == 0
    assert set(tier.load(KEY, NBYTES, Filler()).tolist()) == {7}


@linux_only
def test_held_bytes_counts_what_is_complete_on_this_host(tier: RamTier, directory: Path) -> None:
    keys = [f"{'b' * 64}-0-{size}" for size in (100, 200, 300)]
    seen_while_filling = []

    def fill(view: memoryview) -> None:
        seen_while_filling.append(tier.held_bytes(keys))

    with RamTier(directory, pinned=False) as other:
        other.load(keys[0], 100, fill)
        other.load(keys[1], 200, fill)

        assert tier.held_bytes(keys) == 300
        assert tier.held_bytes([*keys[2:], "../escape"]) == 0
        assert seen_while_filling == [0, 100]
        assert tier.nbytes == 0
    assert tier.held_bytes(keys) == 0


@pytest.mark.parametrize("key", ["-4096-77", "../escape", "", "a" * 300, ".hidden", "a/b"])
def test_a_key_that_cannot_name_content_is_held_privately(tier: RamTier, tmp_path: Path, key: str) -> None:
    tensor = tier.load(key, NBYTES, Filler())

    assert set(tensor.tolist()) == {7}
    assert (tier.nbytes, tier.shared_bytes) == (NBYTES, 0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@linux_only
@pytest.mark.parametrize("spoil", ["absent", "file", "writable by others", "link"])
def test_a_directory_that_cannot_be_trusted_means_private_memory_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: str
) -> None:
    directory = tmp_path / "shared"
    if spoil == "absent":
        directory = directory / "below"
    elif spoil == "file":
        directory.write_text("")
    elif spoil == "writable by others":
        directory.mkdir()
        directory.chmod(0o777)
    else:
        directory.symlink_to(tmp_path)

    with caplog.at_level(logging.WARNING), RamTier(directory, pinned=False) as tier:
        tensors = [tier.load(f"{KEY}{number}", NBYTES, Filler(number)) for number in range(3)]

        assert [int(tensor[-1]) for tensor in tensors] == [0, 1, 2]
        assert (tier.nbytes, tier.shared_bytes, tier.held_bytes([KEY])) == (3 * NBYTES, 0, 0)
    assert len(caplog.records) == 1
    assert "not shared with others" in caplog.text
    assert str(directory) in caplog.text


@linux_only
def test_a_file_of_another_size_under_the_key_is_not_served(tier: RamTier, directory: Path) -> None:
    (directory / KEY).write_bytes(b"stale")

    tensor = tier.load(KEY, NBYTES, Filler())

    assert set(tensor.tolist()) == {7}
    assert (directory / KEY).stat().st_size == NBYTES


@linux_only
def test_more_than_the_host_has_is_refused_before_it_is_taken(tier: RamTier, directory: Path) -> None:
    with pytest.raises(DeviceError, match=r"are wanted and .* are available .* RAM budget"):
        tier.load(KEY, 1 << 50, Filler())

    assert os.listdir(directory) == []


@linux_only
def test_reclaim_removes_what_nobody_uses_and_nothing_else(tier: RamTier, directory: Path) -> None:
    tier.load(KEY, NBYTES, Filler())
    (directory / ("c" * 64)).write_bytes(b"x" * 8192)
    (directory / ("d" * 64 + ".part")).write_bytes(b"x" * 4096)
    (directory / "notes.txt").write_text("mine")
    (directory / "folder").mkdir()

    freed = reclaim(directory)

    assert freed == 8192 + 4096
    assert sorted(os.listdir(directory)) == sorted([KEY, "folder", "notes.txt"])
    assert reclaim(directory / "nowhere") == 0


@linux_only
def test_opening_a_tier_reclaims(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory / KEY).write_bytes(b"x" * NBYTES)

    with RamTier(directory, pinned=False):
        assert os.listdir(directory) == []


@linux_only
def test_pieces_come_and_go_in_parallel_without_a_wrong_byte(directory: Path) -> None:
    rounds = itertools.count()
    keys = [f"{number:064x}-0-{NBYTES}" for number in range(3)]
    stop = threading.Event()

    def use(worker: int) -> int:
        wrong = 0
        for turn in range(40):
            number = (worker + turn) % len(keys)
            with RamTier(directory, pinned=False) as tier:
                tensor = tier.load(keys[number], NBYTES, Filler(number + 1))
                wrong += int((tensor != number + 1).sum()) + (tier.shared_bytes != NBYTES)
            next(rounds)
        return wrong

    def remove() -> None:
        while not stop.wait(0.001):
            reclaim(directory)

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            wrong = [future.result(timeout=60) for future in [pool.submit(use, worker) for worker in range(4)]]
    finally:
        stop.set()
        remover.join(timeout=40)

    assert wrong == [0, 0, 0, 0]
    assert next(rounds) == 160
    assert os.listdir(directory) == []


@linux_only
def test_threads_of_one_tier_load_a_piece_once(tier: RamTier) -> None:
    fill = Filler()
    barrier = threading.Barrier(4)

    def load() -> int:
        barrier.wait(timeout=40)
        return tier.load(KEY, NBYTES, fill).data_ptr()

    with ThreadPoolExecutor(4) as pool:
        addresses = {future.result(timeout=40) for future in [pool.submit(load) for _ in range(4)]}

    assert len(addresses) == 1
    assert fill.calls == 1


@linux_only
def test_closing_while_a_piece_loads_lets_go_of_it(tier: RamTier, directory: Path) -> None:
    def fill(view: memoryview) -> None:
        tier.close()

    with pytest.raises(EngineClosed, match="closed while"):
        tier.load(KEY, NBYTES, fill)

    assert os.listdir(directory) == []


@linux_only
def test_no_descriptor_is_left_open(directory: Path) -> None:
    with RamTier(directory, pinned=False) as tier:
        tensors = [tier.load(f"{number:064x}", NBYTES, Filler()) for number in range(20)]
        during = open_files_below(directory)
    del tensors
    gc.collect()

    assert len(during) == 40
    assert open_files_below(directory) == []


@linux_only
@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no /dev/shm here")
def test_the_usual_directory_is_the_users_own_and_goes_when_empty() -> None:
    directory = default_directory()
    key = hashlib.sha256(os.urandom(16)).hexdigest()

    with RamTier(pinned=False) as tier:
        tier.load(key, NBYTES, Filler())
        assert str(os.getuid()) in directory.name
        assert (directory / key).exists()

    assert not (directory / key).exists()
    wait_until(lambda: not directory.exists() or os.listdir(directory))


@linux_only
def test_the_directory_is_made_again_if_another_process_took_it_away(tier: RamTier, directory: Path) -> None:
    directory.rmdir()

    tier.load(KEY, NBYTES, Filler())

    assert tier.shared_bytes == NBYTES


@linux_only
def test_a_model_built_again_never_gets_the_bytes_of_the_one_before(tmp_path: Path, tier: RamTier) -> None:
    store = ShardStore(tmp_path / "store")
    for std in (0.02, 0.03):
        source = tiny_models.save_checkpoint(tmp_path / f"source-{std}", "llama", SHAPE, std=std)
        shards = store.ensure("tiny", source=source).layers

        for index, shard in enumerate(shards):
            whole = shard.path.read_bytes()
            piece = layer_piece(shard, index)
            tensor = tier.load(piece.key, piece.nbytes, io.BytesIO(whole[piece.start :]).readinto)
            assert shard.digest == hashlib.sha256(whole).hexdigest()
            assert bytes(tensor.numpy()) == whole[piece.start :]
        store.remove("tiny")

    assert tier.shared_bytes == 2 * sum(shard.nbytes for shard in shards)
