"""Where a layer's bytes are while it computes: a host slot on the CPU, one of at most two device slots on a GPU.

The sweep sees one small interface, `LayerSlots`: acquire the next layer, release it, rewind after a failure. Copies
to a GPU run on their own stream from their own thread, ordered by events only, so that reading, copying and computing
overlap.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import NamedTuple, Protocol

import torch

from lamella_engine.device import free_memory_bytes
from lamella_engine.errors import DeviceError, EngineError
from lamella_engine.reader import STALL_S, FilledSlot, HostSlot, LayerReader, take_until_stopped
from lamella_engine.shard import Shard

logger = logging.getLogger(__name__)

MAX_DEVICE_SLOTS = 2  # one computes while the other is filled
_SLOTS_SHARE = 0.8  # of the free device memory that two slots may take; the rest is for keys, values and activations
_ONE_SLOT_SHARE = 0.9


class BoundSlot(NamedTuple):
    """A layer's bytes on the compute device: `tensor` is uint8, `key` names the buffer for caches of views."""

    key: int
    tensor: torch.Tensor


class LayerSlots(Protocol):
    """What the sweep needs of a device: the next layer's bytes, in order."""

    def acquire(self, layer: int) -> BoundSlot:
        """The bytes of `layer`, which must be the next one in sweep order, until `release`."""

    def release(self) -> None:
        """Give the acquired layer's buffer back."""

    def rewind(self) -> None:
        """Begin again at layer 0, whatever was acquired or on its way."""

    def close(self) -> None:
        """Stop threads, close files; idempotent."""


def open_layer_slots(shards: tuple[Shard, ...], ring_slots: int, device: torch.device) -> LayerSlots:
    """The slots for `device`, with a reader of `ring_slots` host buffers already running."""
    if device.type == "cuda":
        return CudaLayerSlots(shards, ring_slots, device)
    return HostLayerSlots(shards, ring_slots)


def num_device_slots(layer_bytes: int, device: torch.device) -> int:
    """How many layers of `layer_bytes` are on the GPU at once: two where they fit, else one, without overlap.

    Raises:
        DeviceError: not even one layer fits.
    """
    free = free_memory_bytes(device)
    if MAX_DEVICE_SLOTS * layer_bytes <= _SLOTS_SHARE * free:
        return MAX_DEVICE_SLOTS
    if layer_bytes > _ONE_SLOT_SHARE * free:
        raise DeviceError(
            f"the largest layer has {layer_bytes:,} bytes and {device} has {free:,} free beside the model's resident "
            "part; use a card with more memory, or the CPU (--device cpu)"
        )
    logger.warning("%s holds one layer of %d bytes at a time: copying and computing take turns", device, layer_bytes)
    return 1


class HostLayerSlots:
    """CPU: the reader's own buffers are bound, nothing is copied."""

    def __init__(self, shards: tuple[Shard, ...], ring_slots: int) -> None:
        self._reader = LayerReader(shards, ring_slots, pinned=False)
        self._held: HostSlot | None = None
        self._reader.start()

    def acquire(self, layer: int) -> BoundSlot:
        """See `LayerSlots`."""
        filled = self._reader.next_filled()
        self._held = filled.slot
        _check_order(filled.layer, layer)
        return BoundSlot(id(filled.slot), filled.slot.tensor)

    def release(self) -> None:
        """See `LayerSlots`."""
        assert self._held is not None, "released without acquire"
        self._reader.give_back(self._held)
        self._held = None

    def rewind(self) -> None:
        """See `LayerSlots`."""
        self._reader.stop()
        self._held = None
        self._reader.start()

    def close(self) -> None:
        """See `LayerSlots`."""
        self._reader.close()


class _DeviceSlot:
    """One device buffer with the events that order its use: filled by the copy stream, freed by the compute stream."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.copied: torch.cuda.Event | None = None
        self.computed: torch.cuda.Event | None = None


class CudaLayerSlots:
    """GPU: a thread copies each filled host buffer to the next free device slot on a stream of its own."""

    def __init__(self, shards: tuple[Shard, ...], ring_slots: int, device: torch.device) -> None:
        self._device = device
        self._nbytes = [shard.nbytes for shard in shards]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch leaves it without types
        count = num_device_slots(max(self._nbytes), device)
        self._slots = [_DeviceSlot(max(self._nbytes), device) for _ in range(count)]
        self._reader = LayerReader(shards, ring_slots, pinned=True)
        self._stop = threading.Event()
        self._held: _DeviceSlot | None = None
        self._start()

    def acquire(self, layer: int) -> BoundSlot:
        """See `LayerSlots`; the current stream waits for the copy, the caller does not."""
        try:
            item = self._ready.get(timeout=STALL_S)
        except queue.Empty:
            raise EngineError(f"no layer reached {self._device} within {STALL_S:.0f} s") from None
        if isinstance(item, BaseException):
            raise item
        arrived, slot = item
        self._held = slot
        _check_order(arrived, layer)
        assert slot.copied is not None, "a ready slot has been copied"
        torch.cuda.current_stream(self._device).wait_event(slot.copied)
        return BoundSlot(id(slot), slot.tensor)

    def release(self) -> None:
        """See `LayerSlots`."""
        assert self._held is not None, "released without acquire"
        slot, self._held = self._held, None
        slot.computed = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch leaves it without types
        slot.computed.record(torch.cuda.current_stream(self._device))
        self._free.put_nowait(slot)

    def rewind(self) -> None:
        """See `LayerSlots`."""
        self._halt()
        self._start()

    def close(self) -> None:
        """See `LayerSlots`."""
        self._halt()
        self._reader.close()

    def _start(self) -> None:
        self._stop.clear()
        self._held = None
        self._free: queue.Queue[_DeviceSlot] = queue.Queue(maxsize=MAX_DEVICE_SLOTS)
        self._ready: queue.Queue[tuple[int, _DeviceSlot] | BaseException] = queue.Queue(maxsize=MAX_DEVICE_SLOTS + 1)
        for slot in self._slots:
            self._free.put_nowait(slot)
        self._reader.start()
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="lamella-copier", daemon=True)
        self._thread.start()

    def _halt(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=STALL_S)
            if self._thread.is_alive():
                raise EngineError(f"the copier did not stop within {STALL_S:.0f} s")
            self._thread = None
        self._reader.stop()
        torch.cuda.synchronize(self._device)

    def _run(self) -> None:
        try:
            torch.cuda.set_device(self._device)
            while (slot := take_until_stopped(self._free, self._stop)) is not None:
                self._copy(self._reader.next_filled(), slot)
        except Exception as error:  # noqa: BLE001 - raised again by the sweep that waits
            self._ready.put_nowait(error)

    def _copy(self, filled: FilledSlot, slot: _DeviceSlot) -> None:
        nbytes = self._nbytes[filled.layer]
        with torch.cuda.stream(self._stream):
            if slot.computed is not None:
                self._stream.wait_event(slot.computed)
            slot.tensor[:nbytes].copy_(filled.slot.tensor[:nbytes], non_blocking=True)
            slot.copied = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch leaves it without types
            slot.copied.record(self._stream)
        filled.slot.copied = slot.copied
        self._reader.give_back(filled.slot)
        self._ready.put_nowait((filled.layer, slot))


def _check_order(arrived: int, wanted: int) -> None:
    if arrived != wanted:
        raise EngineError(
            f"layer {wanted} was called while layer {arrived} is next: this model does not call each layer once, "
            "in order, which streaming relies on"
        )
