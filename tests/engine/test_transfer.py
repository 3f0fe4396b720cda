"""On a GPU: copies wait for the computing before them, computing for its copies, and times are told of whole sweeps."""

from __future__ import annotations

import pytest
import torch

from lamella_engine import transfer as transfer_module
from lamella_engine.host_memory import HostMemory
from lamella_engine.timeline import Lane, Timeline
from lamella_engine.transfer import CudaTransfer, DeviceSlot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

NBYTES = 1 << 20
LONG_CYCLES = 200_000_000  # some tenths of a second
NAMES = ("layer 0", "layer 1")


class OneSlot:
    """Two pieces that take turns in one slot: the host's bytes say which sweep and piece they are."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.transfer = CudaTransfer(self.device, NAMES)
        self.slot = DeviceSlot(0, self.transfer.allocate(NBYTES))
        self.sums: list[torch.Tensor] = []

    def sweep(self, host: torch.Tensor, *, is_slow: bool) -> None:
        """Copy and compute each piece in turn, nobody waiting for anything."""
        for number in range(len(NAMES)):
            self.transfer.begin_piece(number, self.slot)
            self.transfer.copy(self.slot.tensor, host[len(self.sums)])
            self.transfer.end_piece(number, self.slot)
            self.transfer.await_piece(number, self.slot)
            self.transfer.begin_compute(number)
            if is_slow:
                torch.cuda._sleep(LONG_CYCLES)
            self.sums.append(self.slot.tensor.long().sum())
            self.transfer.end_compute(number)


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_slot_is_filled_again_only_when_its_piece_was_computed(is_slow: bool) -> None:
    with HostMemory(6 * NBYTES, pinned=True) as memory:
        host = memory.tensor.view(6, NBYTES)
        host.copy_(torch.arange(1, 7, dtype=torch.uint8)[:, None].expand(-1, NBYTES))
        slot = OneSlot()
        for _ in range(3):
            slot.sweep(host, is_slow=is_slow)
        sums = [int(total) for total in slot.sums]
        slot.transfer.close()

    assert sums == [number * NBYTES for number in range(1, 7)]


def test_times_are_told_of_a_sweep_that_nobody_has_waited_for() -> None:
    timeline = Timeline(is_tracing=True)

    with HostMemory(2 * NBYTES, pinned=True) as memory:
        slot = OneSlot()
        slot.sweep(memory.tensor.view(2, NBYTES), is_slow=True)
        slot.transfer.end_sweep(timeline)
        slot.transfer.close()

    computed = [interval for interval in timeline.intervals() if interval.lane is Lane.COMPUTE]
    assert [interval.name for interval in computed] == list(NAMES)
    assert all(interval.end_s - interval.begin_s > 0.01 for interval in computed)
    assert computed[0].end_s <= computed[1].begin_s + 1e-3
    assert timeline.totals().copy_s > 0


def test_times_stay_in_order_when_the_clock_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "CLOCK_S", 0.0)
    timeline = Timeline(is_tracing=True)

    with HostMemory(6 * NBYTES, pinned=True) as memory:
        slot = OneSlot()
        for _ in range(3):
            slot.sweep(memory.tensor.view(6, NBYTES), is_slow=True)
            slot.transfer.end_sweep(timeline)
        slot.transfer.close()

    begins = [interval.begin_s for interval in timeline.intervals() if interval.lane is Lane.COMPUTE]
    assert begins == sorted(begins)


def test_after_a_restart_pieces_begin_at_the_first() -> None:
    with HostMemory(4 * NBYTES, pinned=True) as memory:
        host = memory.tensor.view(4, NBYTES)
        host.copy_(torch.arange(1, 5, dtype=torch.uint8)[:, None].expand(-1, NBYTES))
        slot = OneSlot()
        slot.transfer.begin_piece(0, slot.slot)
        slot.transfer.copy(slot.slot.tensor, host[3])
        slot.transfer.restart()
        slot.slot.piece = None
        for _ in range(2):
            slot.sweep(host, is_slow=False)
        sums = [int(total) for total in slot.sums]
        slot.transfer.close()

    assert sums == [number * NBYTES for number in range(1, 5)]
