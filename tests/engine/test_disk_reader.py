"""Pieces come round and round in order, read ahead in chunks; a shard that changed is an error by name."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella_engine.disk_reader import DiskReader, slot_bytes
from lamella_engine.errors import EngineError, ShardError
from lamella_engine.expert_fetch import ExpertFetch
from lamella_engine.file_reads import ReadStyle, ShardFile, read_piece
from lamella_engine.host_memory import HostMemory
from lamella_engine.pieces import Piece, PlacedPiece
from lamella_engine.placement import Tier
from lamella_engine.timeline import Lane, Timeline
from lamella_engine.weight_stream import HostStream
from tests.waiting import wait_until

PIECE_BYTES = 3 * 4096 + 17
STYLE = ReadStyle(depth=3, block_bytes=4096)


@pytest.fixture
def pieces(tmp_path: Path) -> tuple[Piece, ...]:
    made = []
    for index in range(5):
        path = tmp_path / f"layer-{index}"
        path.write_bytes(b"\0" * 4096 + bytes([index + 1]) * PIECE_BYTES)
        made.append(Piece(f"layer {index}", path, 4096, PIECE_BYTES, ""))
    return tuple(made)


def open_reader(
    pieces: tuple[Piece, ...], chunk_bytes: int, slots: int, timeline: Timeline | None = None
) -> DiskReader:
    memory = HostMemory(slots * slot_bytes(pieces, chunk_bytes, passes_on=False))
    return DiskReader(pieces, memory, chunk_bytes, STYLE, timeline or Timeline())


@pytest.fixture
def reader(pieces: tuple[Piece, ...]) -> Iterator[DiskReader]:
    reader = open_reader(pieces, PIECE_BYTES, 3)
    yield reader
    reader.close()


def test_whole_pieces_arrive_in_order_and_wrap_around(reader: DiskReader) -> None:
    reader.start()

    seen = []
    for _ in range(12):
        chunk = reader.next_filled()
        assert bytes(chunk.tensor.numpy()) == bytes([chunk.piece + 1]) * PIECE_BYTES
        seen.append(chunk.piece)
        reader.give_back(chunk)

    assert seen == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("start", [4096, 4096 + 64, 100])
def test_chunks_of_a_piece_make_it_whole_wherever_it_begins(start: int, tmp_path: Path) -> None:
    data = os.urandom(start + 5 * 4096 + 333)
    path = tmp_path / "shard"
    path.write_bytes(data)
    pieces = (Piece("layer", path, start, 5 * 4096 + 333, ""),)
    reader = open_reader(pieces, 2 * 4096, 2)
    try:
        reader.start()

        for _ in range(2):
            whole = b""
            while len(whole) < pieces[0].nbytes:
                chunk = reader.next_filled()
                assert chunk.offset == len(whole)
                whole += bytes(chunk.tensor.numpy())
                reader.give_back(chunk)
            assert whole == data[start:]
    finally:
        reader.close()


def test_the_ring_is_filled_ahead_and_no_further(reader: DiskReader) -> None:
    reader.start()

    wait_until(lambda: sum(chunk.pending == 0 for chunk in reader._filling) == 3)
    held = [reader.next_filled() for _ in range(3)]

    assert [chunk.piece for chunk in held] == [0, 1, 2]
    assert not reader._filling


def test_a_slot_is_filled_again_only_after_its_copy(reader: DiskReader) -> None:
    reader.start()
    copied = threading.Event()
    first = reader.next_filled()
    reader.give_back(first, lambda: copied.wait(40) and None)
    for _ in range(2):
        reader.give_back(reader.next_filled())

    assert int(first.tensor[0]) == 1
    copied.set()

    assert reader.next_filled().piece == 3


def test_a_shard_cut_short_while_in_use_is_named(reader: DiskReader, pieces: tuple[Piece, ...]) -> None:
    os.truncate(pieces[1].path, 5000)
    reader.start()

    def read_on() -> None:
        for _ in range(2):
            reader.give_back(reader.next_filled())

    with pytest.raises(ShardError, match=r"layer-1 ends .* bytes early"):
        read_on()


def test_a_missing_shard_is_refused_at_once(pieces: tuple[Piece, ...]) -> None:
    pieces[2].path.unlink()

    with pytest.raises(ShardError, match="layer-2"):
        open_reader(pieces, PIECE_BYTES, 3)


def test_a_deleted_shard_can_still_be_read_while_open(reader: DiskReader, pieces: tuple[Piece, ...]) -> None:
    for piece in pieces:
        piece.path.unlink()
    reader.start()

    assert bytes(reader.next_filled().tensor[:3].numpy()) == b"\1\1\1"


def test_stop_and_start_begin_again_at_the_first_piece(reader: DiskReader) -> None:
    reader.start()
    reader.next_filled()
    reader.next_filled()

    reader.stop()
    reader.start()

    assert reader.next_filled().piece == 0


def test_reads_are_told_to_the_timeline(pieces: tuple[Piece, ...]) -> None:
    timeline = Timeline(is_tracing=True)
    reader = open_reader(pieces, PIECE_BYTES, 3, timeline)
    try:
        reader.start()
        reader.give_back(reader.next_filled())
    finally:
        reader.close()

    assert timeline.totals().read_s > 0
    assert (Lane.READ, "layer 0") in [interval[:2] for interval in timeline.intervals()]


def test_a_stream_refuses_a_model_that_skips_a_layer(pieces: tuple[Piece, ...]) -> None:
    placed = [PlacedPiece(piece, Tier.DISK) for piece in pieces]
    timeline = Timeline()
    stream = HostStream(placed, {}, open_reader(pieces, PIECE_BYTES, 3), ExpertFetch(placed, timeline, {}), timeline)
    try:
        stream.acquire(0)
        stream.release(0)

        with pytest.raises(EngineError, match="layer 2 was called while layer 1 is next"):
            stream.acquire(2)

        stream.rewind()
        assert bytes(stream.acquire(0).tensor[:2].numpy()) == b"\1\1"
    finally:
        stream.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("start", [4096, 4160])
def test_a_piece_is_read_whole_at_once(start: int, direct: bool, tmp_path: Path) -> None:
    data = os.urandom(start + 9 * 4096 + 5)
    path = tmp_path / "shard"
    path.write_bytes(data)
    piece = Piece("layer", path, start, 9 * 4096 + 5, "")

    with HostMemory(piece.nbytes) as memory:
        read_piece(piece, memory.view, ReadStyle(depth=2, block_bytes=2 * 4096, direct=direct))

        assert bytes(memory.view) == data[start:]


def test_a_file_system_without_direct_reads_is_read_through_its_cache() -> None:
    path = Path(f"/dev/shm/lamella-test-{os.getpid()}")
    path.write_bytes(b"x" * 10_000)
    try:
        file = ShardFile(path, direct=True)
        with HostMemory(12288) as memory:
            file.read(memory.view, 0, 10_000)
            assert bytes(memory.view[:10_000]) == b"x" * 10_000
        file.close()
    finally:
        path.unlink()
