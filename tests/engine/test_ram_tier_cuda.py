"""With a real driver: shared pieces are pinned where they are, counted to the byte, and copied at the pinned rate."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from lamella_engine.errors import DeviceError
from lamella_engine.host_memory import HostMemory, pinned_bytes
from lamella_engine.ram_tier import RamTier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

NBYTES = (64 << 20) + 4097


def fill(view: memoryview) -> None:
    view[:] = bytes(range(256)) * (len(view) // 256) + b"\7" * (len(view) % 256)


@pytest.mark.parametrize("shared", [True, False])
def test_a_pinned_piece_reaches_the_device_whole(tmp_path: Path, shared: bool) -> None:
    directory = None if shared else tmp_path / "no" / "such"
    before = pinned_bytes()
    with RamTier(directory, pinned=True) as tier, RamTier(directory, pinned=True) as other:
        tensors = [one.load("0" * 63 + "1", NBYTES, fill) for one in (tier, other)]

        assert all(tensor.is_pinned() for tensor in tensors)
        assert (tier.shared_bytes > 0) == shared
        assert pinned_bytes() - before == 2 * NBYTES
        for tensor in tensors:
            copy = torch.empty(NBYTES, dtype=torch.uint8, device="cuda")
            copy.copy_(tensor, non_blocking=True)
            torch.cuda.synchronize()
            assert torch.equal(copy.cpu(), tensor)

    assert pinned_bytes() == before
    assert not tensors[0].is_pinned()


def test_a_copy_out_of_pinned_memory_does_not_hold_the_caller_up() -> None:
    nbytes = 1 << 30
    with HostMemory(nbytes, pinned=True) as memory:
        device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        device.copy_(memory.tensor, non_blocking=True)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()

        with torch.cuda.stream(stream):
            for _ in range(4):
                device.copy_(memory.tensor, non_blocking=True)
        is_still_running = not stream.query()
        torch.cuda.synchronize()

    assert is_still_running


def test_threads_pin_pieces_at_once() -> None:
    before = pinned_bytes()
    with RamTier(pinned=True) as tier:
        threads = [threading.Thread(target=tier.load, args=(f"{number:064x}-7", 1 << 20, fill)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)

        assert pinned_bytes() - before == 8 << 20

    assert pinned_bytes() == before


def test_the_same_memory_twice_is_refused_and_harms_nothing() -> None:
    with HostMemory(1 << 20, pinned=True) as memory:
        assert memory._mapping is not None

        with pytest.raises(DeviceError, match=r"cannot pin 1,048,576 bytes .* already"):
            HostMemory.from_mapping(memory._mapping, pinned=True)

        memory.tensor.fill_(3)
        assert int(memory.tensor.to("cuda").sum()) == 3 << 20
