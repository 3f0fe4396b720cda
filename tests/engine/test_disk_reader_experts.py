"""Pieces without their experts, and the experts that are fetched: exact bytes wherever they lie, whatever is full."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lamella_engine.disk_reader import DiskReader, FilledChunk, slot_bytes
from lamella_engine.errors import ShardError
from lamella_engine.experts import ExpertBytes
from lamella_engine.file_reads import ReadStyle
from lamella_engine.host_memory import HostMemory
from lamella_engine.pieces import Piece
from lamella_engine.timeline import Timeline

STYLE = ReadStyle(depth=3, block_bytes=4096)
# Two tensors of four experts, neither of whose parts begin on a page.
EXPERTS = ExpertBytes("mlp.experts", 4, 1, ((100, 5000), (30_000, 2048)))
NBYTES = 50_000
CHUNK = 2 * 4096
ONE_TOKEN = 1


@pytest.fixture
def data() -> list[bytes]:
    return [os.urandom(NBYTES) for _ in range(3)]


@pytest.fixture
def pieces(data: list[bytes], tmp_path: Path) -> tuple[Piece, ...]:
    made = []
    for index, content in enumerate(data):
        path = tmp_path / f"layer-{index}"
        path.write_bytes(b"\0" * 4096 + content)
        made.append(Piece(f"layer {index}", path, 4096, NBYTES, "", EXPERTS))
    return tuple(made)


def open_reader(pieces: tuple[Piece, ...], chunk_bytes: int, slots: int, *, passes_on: bool = True) -> DiskReader:
    memory = HostMemory(slots * slot_bytes(pieces, chunk_bytes, passes_on=passes_on))
    reader = DiskReader(pieces, memory, chunk_bytes, STYLE, Timeline(), passes_on=passes_on)
    reader.expect(ONE_TOKEN)
    reader.start()
    return reader


def held(chunk: FilledChunk) -> bytes:
    return bytes(chunk.tensor.numpy())


@pytest.mark.parametrize("chunk_bytes", [CHUNK, 2 * NBYTES])
def test_a_piece_in_chunks_comes_without_its_experts(
    chunk_bytes: int, pieces: tuple[Piece, ...], data: list[bytes]
) -> None:
    reader = open_reader(pieces, chunk_bytes, 8)
    got = bytearray(NBYTES)

    chunk = reader.next_filled()
    while True:
        got[chunk.offset : chunk.offset + chunk.nbytes] = held(chunk)
        reader.give_back(chunk)
        if chunk.is_last:
            break
        chunk = reader.next_filled()

    reader.close()
    for start, nbytes in EXPERTS.others(NBYTES):
        assert got[start : start + nbytes] == data[0][start : start + nbytes]
    assert got[100:20_100] == bytes(20_000)


@pytest.mark.parametrize("chunk_bytes", [CHUNK, 2 * NBYTES])
@pytest.mark.parametrize("chosen", [[0], [3], [1, 2], [0, 1, 2, 3]])
def test_experts_are_fetched_though_every_other_slot_is_full(
    chosen: list[int], chunk_bytes: int, pieces: tuple[Piece, ...], data: list[bytes]
) -> None:
    reader = open_reader(pieces, chunk_bytes, 4)
    got = bytearray(NBYTES)

    for chunk in reader.fetch(2, EXPERTS.ranges(chosen)):  # nobody takes what is read ahead
        got[chunk.offset : chunk.offset + chunk.nbytes] = held(chunk)
        reader.give_back(chunk)

    ahead = reader.next_filled()
    reader.close()
    for expert in chosen:
        for start, nbytes in EXPERTS.ranges([expert]):
            assert got[start : start + nbytes] == data[2][start : start + nbytes]
    assert (ahead.piece, ahead.offset) == (0, 0)


def test_experts_take_their_places_in_a_whole_piece(pieces: tuple[Piece, ...], data: list[bytes]) -> None:
    reader = open_reader(pieces, NBYTES, 2, passes_on=False)
    chunk = reader.next_filled()

    reader.fill(chunk, EXPERTS.ranges([1]))
    reader.fill(chunk, EXPERTS.ranges([3, 0]))

    got = held(chunk)
    reader.close()
    for start, nbytes in (*EXPERTS.others(NBYTES), *EXPERTS.ranges([0, 1, 3])):
        assert got[start : start + nbytes] == data[0][start : start + nbytes]


def test_with_many_tokens_pieces_come_whole(pieces: tuple[Piece, ...], data: list[bytes]) -> None:
    reader = open_reader(pieces, NBYTES, 1, passes_on=False)
    reader.give_back(reader.next_filled())
    reader.expect(1000)

    for _ in range(3):  # some were begun before
        chunk = reader.next_filled()
        whole = held(chunk)
        reader.give_back(chunk)

    reader.close()
    assert not chunk.is_sparse
    assert whole == data[chunk.piece]


def test_an_expert_that_cannot_be_read_is_an_error_by_name(pieces: tuple[Piece, ...]) -> None:
    reader = open_reader(pieces, NBYTES, 2, passes_on=False)
    chunk = reader.next_filled()
    os.truncate(pieces[0].path, 8192)

    with pytest.raises(ShardError, match="layer-0"):
        reader.fill(chunk, EXPERTS.ranges([3]))

    reader.close()
