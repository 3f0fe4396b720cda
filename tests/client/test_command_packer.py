"""Commands as bytes: what redis-py would send, word for word."""

from __future__ import annotations

import pytest
from redis._parsers import Encoder
from redis.connection import PythonRespSerializer
from redis.exceptions import DataError

from lamella.command_packer import CommandPacker

THEIRS = PythonRespSerializer(6000, Encoder("utf-8", "surrogateescape", decode_responses=True).encode)


@pytest.mark.parametrize(
    "command",
    [
        ("PING",),
        ("SCRIPT LOAD", "return 1"),
        (b"SCRIPT LOAD", b"return 1"),
        ("EVALSHA", "0" * 40, 2, "job:1", "tok:1", "lamella:", 21600, 3.5, -7, "", 'a "text" of ümläuts \U0001f600'),
        ("SET", "k", b"\x00\xff\r\n"),
        ("SET", "k", "bytes that were no text: \udcff"),
        ("SET", "k", "long " * 5000),
        ("SET", "k", bytearray(b"abc")),
    ],
)
def test_a_command_is_what_redis_py_makes_of_it(command: tuple[object, ...]) -> None:
    ours, theirs = CommandPacker().pack(*command), THEIRS.pack(*command)

    assert b"".join(ours) == b"".join(theirs)


@pytest.mark.parametrize("word", [None, True, ["a"]])
def test_what_is_no_word_is_refused(word: object) -> None:
    with pytest.raises(DataError):
        CommandPacker().pack("SET", "k", word)
