"""Turns generated token ids into text as they come, a token at a time.

Two things are held back: bytes that do not make a whole character yet, and text that may be the beginning of a stop
string. What is emitted never has to be taken back. Replaying the same ids gives the same pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

_INCOMPLETE = "\ufffd"  # what a decoder shows for bytes that are no character (yet)
_MAX_PENDING_TOKENS = 8  # more tokens than this without a whole character are broken bytes, not a long character


class Piece(NamedTuple):
    """Text that may be shown now, and whether a stop string ended it."""

    text: str
    is_stopped: bool


class Detokenizer:
    """The text of one sequence; `decode` maps token ids to text without special tokens."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        self._window = 0  # decoding starts here: the tokens of the piece before, for decoders that look back
        self._read = 0  # tokens before this are emitted or held
        self._prefix = ""  # text of ids[window:read]
        self._held = ""

    def push(self, token_id: int) -> Piece:
        """Add one token; the text it makes visible."""
        self._ids.append(token_id)
        return self._release(self._new_text())

    def alone(self, token_id: int) -> str:
        """The text of one token by itself; empty for a special one, and with marks for a part of a character."""
        return self._decode([token_id])

    def flush(self) -> str:
        """The text held for a stop string that did not come; an incomplete character at the very end is dropped."""
        held, self._held = self._held, ""
        return held

    def _new_text(self) -> str:
        text = self._decode(self._ids[self._window :])
        is_overdue = len(self._ids) - self._read > _MAX_PENDING_TOKENS
        if len(text) <= len(self._prefix) or (text.endswith(_INCOMPLETE) and not is_overdue):
            return ""
        new = text[len(self._prefix) :]
        self._window, self._read = self._read, len(self._ids)
        self._prefix = self._decode(self._ids[self._window :])
        return new

    def _release(self, new: str) -> Piece:
        text = self._held + new
        hits = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if hits:
            self._held = ""
            return Piece(text[: min(hits)], is_stopped=True)
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return Piece(text[: len(text) - keep], is_stopped=False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
