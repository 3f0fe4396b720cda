"""Text comes in whole characters and never shows a stop string."""

from __future__ import annotations

import pytest

from lamella_engine.detokenizer import Detokenizer


def decode_bytes(ids: list[int]) -> str:
    """A tokenizer whose tokens are the bytes of UTF-8."""
    return bytes(ids).decode(errors="replace")


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(decode_bytes, stop)
    shown = []
    for byte in text.encode():
        piece = detokenizer.push(byte)
        shown.append(piece.text)
        if piece.is_stopped:
            return shown, True
    return [*shown, detokenizer.flush()], False


@pytest.mark.parametrize("text", ["plain", "naïve café", "漢字かな", "🍎🍏 and 👩‍👩‍👧", "é"])
def test_pieces_add_up_to_the_text_without_half_characters(text: str) -> None:
    shown, is_stopped = pieces(text)

    assert "".join(shown) == text
    assert not is_stopped
    assert all("\ufffd" not in piece for piece in shown)


def test_an_incomplete_character_at_the_end_is_dropped() -> None:
    detokenizer = Detokenizer(decode_bytes)

    shown = [detokenizer.push(byte).text for byte in "ok🍎".encode()[:-1]]

    assert "".join(shown) + detokenizer.flush() == "ok"


def test_bytes_that_never_make_a_character_do_not_hold_the_text_for_ever() -> None:
    detokenizer = Detokenizer(decode_bytes)

    shown = [detokenizer.push(byte).text for byte in b"\xff" * 20 + b"after"]

    assert "".join(shown).endswith("after")
    assert len("".join(shown)) == 25


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("aab", ("ab",), "a"),
        ("ababac!", ("abac",), "ab"),
        ("first second", ("second", "first"), ""),
        ("stop at 🍎 please", ("🍎",), "stop at "),
    ],
)
def test_a_stop_string_and_what_follows_never_show(text: str, stop: tuple[str, ...], expected: str) -> None:
    shown, is_stopped = pieces(text, stop)

    assert "".join(shown) == expected
    assert is_stopped == (text != expected)


def test_a_possible_stop_string_is_held_until_it_is_decided() -> None:
    detokenizer = Detokenizer(decode_bytes, ("###",))

    held = [detokenizer.push(byte).text for byte in b"a##"]
    released = detokenizer.push(ord("b"))

    assert held == ["a", "", ""]
    assert released.text == "##b"


def test_replaying_the_ids_gives_the_same_pieces() -> None:
    text = "héllo ## wörld 🍎"

    assert pieces(text, ("###",)) == pieces(text, ("###",))
