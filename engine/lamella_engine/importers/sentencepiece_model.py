"""A sentencepiece model file: its pieces and its rules for text, read without running or trusting anything else.

Owns the few fields of the file's protocol-buffer encoding that tokenisation depends on. Neighbours:
`sentencepiece_tokenizer` turns the result into a tokenizer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from lamella_engine.errors import CheckpointError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class PieceKind(IntEnum):
    """What a piece is, with the file's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    """How pieces are chosen, with the file's numbers."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a model that decide how text is cut.

    Attributes:
        pieces: the vocabulary in the order of ids.
        algorithm: how pieces are chosen.
        charsmap: compiled character normalisation; empty for none.
        has_dummy_prefix: whether a space is put in front of the text.
        removes_extra_whitespace: whether runs of spaces become one, and those at the ends none.
        has_byte_fallback: whether characters without a piece become byte pieces.
        is_whitespace_suffix: whether spaces belong to the end of words.
    """

    pieces: tuple[Piece, ...]
    algorithm: Algorithm
    charsmap: bytes
    has_dummy_prefix: bool
    removes_extra_whitespace: bool
    has_byte_fallback: bool
    is_whitespace_suffix: bool


class _Field(NamedTuple):
    number: int
    value: int | bytes


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read the model file `path`.

    Raises:
        CheckpointError: it cannot be read, or is no sentencepiece model.
    """
    try:
        return _parse(path.read_bytes())
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is not a sentencepiece model: {error}; fetch it again") from error


def _parse(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    return SentencePieceModel(
        pieces=tuple(pieces),
        algorithm=Algorithm(_number(trainer.get(3, Algorithm.UNIGRAM))),
        charsmap=_bytes(normalizer.get(2, b"")),
        has_dummy_prefix=_number(normalizer.get(3, 1)) == 1,
        removes_extra_whitespace=_number(normalizer.get(4, 1)) == 1,
        has_byte_fallback=_number(trainer.get(35, 0)) == 1,
        is_whitespace_suffix=_number(trainer.get(24, 0)) == 1,
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _bytes(fields.get(2, b"\0\0\0\0")))
    kind = PieceKind(_number(fields.get(3, PieceKind.NORMAL)))
    return Piece(_bytes(fields.get(1, b"")).decode("utf-8"), score, kind)


def _fields(data: bytes) -> Iterator[_Field]:
    """Fields of one message in order: numbers for varints, raw bytes for all else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield _Field(number, value)
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"a field of the unknown kind {wire}")
        if at + size > len(data):
            raise ValueError("it ends early")
        yield _Field(number, data[at : at + size])
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for count, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, at + count + 1
    raise ValueError("it ends early")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where bytes belong")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes stand where a number belongs")
    return value
