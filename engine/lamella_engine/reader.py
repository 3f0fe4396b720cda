"""Reads layer shards ahead of the sweep, round and round, into a small ring of host buffers.

Owns one thread, the open shard files and the buffers. The order is fixed (0, 1, ... L-1, 0, 1, ...), so the first
layers of the next sweep are being read while the last part of this one computes. Knows nothing of devices: on the CPU
a filled buffer is bound as it is, on a GPU `slots` copies it on.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from lamella_engine.errors import EngineError, ShardError
from lamella_engine.shard import Shard

READ_BYTES = 8 * 1024 * 1024  # one preadv call; large enough that the system call does not show
STALL_S = 120.0  # a read slower than this is a broken disk
_POLL_S = 0.2  # how soon a waiting thread notices that it should stop

Item = TypeVar("Item")


@dataclass
class HostSlot:
    """One host buffer: `tensor` (uint8) and `view` are the same page-aligned memory.

    `copied` is the event after which a device copy no longer needs the buffer; None on the CPU.
    """

    tensor: torch.Tensor
    view: memoryview
    copied: torch.cuda.Event | None = field(default=None)


class FilledSlot(NamedTuple):
    """A host buffer that holds a layer's bytes."""

    layer: int
    slot: HostSlot


def allocate_host_slot(nbytes: int, *, pinned: bool) -> HostSlot:
    """A buffer of `nbytes`, page-aligned; `pinned` memory can be copied to a GPU without a staging copy."""
    if pinned:
        tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    else:
        tensor = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
    return HostSlot(tensor, memoryview(tensor.numpy()))  # type: ignore[arg-type] # numpy arrays are buffers


class LayerReader:
    """The thread that fills host slots with layers in sweep order.

    `next_filled` and `give_back` belong to one consumer thread. `start` and `stop` come in pairs and may be repeated:
    each start begins again at layer 0.
    """

    def __init__(self, shards: tuple[Shard, ...], num_slots: int, *, pinned: bool) -> None:
        self._shards = shards
        slot_bytes = max(shard.nbytes for shard in shards)
        self._slots = [allocate_host_slot(max(slot_bytes, mmap.PAGESIZE), pinned=pinned) for _ in range(num_slots)]
        self._files: list[int] = []
        self._free: queue.Queue[HostSlot] = queue.Queue(maxsize=num_slots)
        self._filled: queue.Queue[FilledSlot | BaseException] = queue.Queue(maxsize=num_slots + 1)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            for shard in shards:
                self._files.append(_open_shard(shard))
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Begin reading at layer 0."""
        if self._thread is not None:
            raise EngineError("the reader runs already")
        self._stop.clear()
        self._free = queue.Queue(maxsize=len(self._slots))
        self._filled = queue.Queue(maxsize=len(self._slots) + 1)
        for slot in self._slots:
            self._free.put_nowait(slot)
        self._thread = threading.Thread(target=self._run, name="lamella-reader", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop reading and forget what was read ahead; idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=STALL_S)
            if self._thread.is_alive():
                raise EngineError(f"the reader did not stop within {STALL_S:.0f} s: the disk does not answer")
            self._thread = None

    def close(self) -> None:
        """Stop and close the shard files; idempotent."""
        self.stop()
        while self._files:
            os.close(self._files.pop())

    def next_filled(self) -> FilledSlot:
        """The next layer's bytes, in sweep order.

        Raises:
            ShardError: a shard could not be read whole.
            EngineError: nothing came within `STALL_S`.
        """
        try:
            item = self._filled.get(timeout=STALL_S)
        except queue.Empty:
            raise EngineError(f"no layer arrived within {STALL_S:.0f} s: the disk under the shards stalls") from None
        if isinstance(item, BaseException):
            raise item
        return item

    def give_back(self, slot: HostSlot) -> None:
        """Return a slot to be filled again (after its `copied` event, if it has one)."""
        self._free.put_nowait(slot)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                for layer in range(len(self._shards)):
                    slot = take_until_stopped(self._free, self._stop)
                    if slot is None:
                        return
                    if slot.copied is not None:
                        slot.copied.synchronize()
                    _read_data(self._files[layer], self._shards[layer], slot.view)
                    self._filled.put_nowait(FilledSlot(layer, slot))
        except OSError as error:
            self._filled.put_nowait(ShardError(f"reading the shards failed: {error}"))
        except Exception as error:  # noqa: BLE001 - raised again by the sweep that waits
            self._filled.put_nowait(error)


def take_until_stopped(waiting: queue.Queue[Item], stop: threading.Event) -> Item | None:
    """The next of `waiting`, however long it takes to come; None once `stop` is set."""
    while not stop.is_set():
        try:
            return waiting.get(timeout=_POLL_S)
        except queue.Empty:
            continue
    return None


def _open_shard(shard: Shard) -> int:
    try:
        return os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError(f"cannot open {shard.path}: {error.strerror}. Build the model again.") from error


def _read_data(file: int, shard: Shard, view: memoryview) -> None:
    done = 0
    while done < shard.nbytes:
        count = os.preadv(file, [view[done : min(done + READ_BYTES, shard.nbytes)]], shard.data_start + done)
        if count == 0:
            raise ShardError(
                f"{shard.path} ends after {done} of {shard.nbytes} data bytes; it was changed while in use. "
                "Remove the model from the store and build it again."
            )
        done += count


def read_shard(shard: Shard) -> torch.Tensor:
    """All data bytes of one shard as a uint8 tensor of shape [nbytes].

    Raises:
        ShardError: the file cannot be opened or ends early.
    """
    slot = allocate_host_slot(max(shard.nbytes, mmap.PAGESIZE), pinned=False)
    file = _open_shard(shard)
    try:
        _read_data(file, shard, slot.view)
    finally:
        os.close(file)
    return slot.tensor[: shard.nbytes]
