"""Layers come round and round in order, read ahead; a shard that changed is an error by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella_engine.errors import EngineError, ShardError
from lamella_engine.reader import LayerReader
from lamella_engine.shard import Shard
from lamella_engine.slots import HostLayerSlots
from tests.waiting import wait_until

LAYER_BYTES = 3 * 4096 + 17


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Shard, ...]:
    made = []
    for index in range(5):
        path = tmp_path / f"layer-{index}"
        path.write_bytes(b"\0" * 4096 + bytes([index + 1]) * LAYER_BYTES)
        made.append(Shard(path, 4096, LAYER_BYTES, ()))
    return tuple(made)


@pytest.fixture
def reader(shards: tuple[Shard, ...]) -> Iterator[LayerReader]:
    reader = LayerReader(shards, 3, pinned=False)
    yield reader
    reader.close()


def test_layers_arrive_in_order_and_wrap_around(reader: LayerReader) -> None:
    reader.start()

    seen = []
    for _ in range(12):
        layer, slot = reader.next_filled()
        assert bytes(slot.view[:LAYER_BYTES]) == bytes([layer + 1]) * LAYER_BYTES
        seen.append(layer)
        reader.give_back(slot)

    assert seen == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_the_ring_is_filled_ahead_and_no_further(reader: LayerReader) -> None:
    reader.start()

    wait_until(lambda: reader._filled.qsize() == 3, 5.0)
    held = [reader.next_filled() for _ in range(3)]

    assert [filled.layer for filled in held] == [0, 1, 2]
    assert reader._filled.empty()


def test_a_shard_cut_short_while_in_use_is_named(reader: LayerReader, shards: tuple[Shard, ...]) -> None:
    os.truncate(shards[1].path, 5000)
    reader.start()

    reader.give_back(reader.next_filled().slot)

    with pytest.raises(ShardError, match="layer-1 ends after"):
        reader.next_filled()


def test_a_missing_shard_is_refused_at_once(shards: tuple[Shard, ...]) -> None:
    shards[2].path.unlink()

    with pytest.raises(ShardError, match="layer-2"):
        LayerReader(shards, 3, pinned=False)


def test_a_deleted_shard_can_still_be_read_while_open(reader: LayerReader, shards: tuple[Shard, ...]) -> None:
    for shard in shards:
        shard.path.unlink()
    reader.start()

    assert bytes(reader.next_filled().slot.view[:3]) == b"\1\1\1"


def test_stop_and_start_begin_again_at_the_first_layer(reader: LayerReader) -> None:
    reader.start()
    reader.next_filled()
    reader.next_filled()

    reader.stop()
    reader.start()

    assert reader.next_filled().layer == 0


def test_slots_refuse_a_model_that_skips_a_layer(shards: tuple[Shard, ...]) -> None:
    slots = HostLayerSlots(shards, 3)
    try:
        slots.acquire(0)
        slots.release()

        with pytest.raises(EngineError, match="layer 2 was called while layer 1 is next"):
            slots.acquire(2)

        slots.rewind()
        assert bytes(slots.acquire(0).tensor[:2].numpy()) == b"\1\1"
    finally:
        slots.close()
