"""Redis commands as bytes, for connections that send a script call for every token.

Owns the framing (RESP: a count, then each word with its length) of plain text and whole numbers; anything else is left
to redis-py, which joins what it has so far anew for every word. `registry` opens its connections with it.
"""

from __future__ import annotations

from redis._parsers import Encoder
from redis.connection import PythonRespSerializer

_PLAIN = frozenset((str, int))
_LONG_BYTES = 6000  # redis-py's own bound, above which it does not join


class CommandPacker:
    """What redis-py asks of a packer; text is UTF-8, bytes that are none included, as `registry` reads them."""

    def __init__(self) -> None:
        encoder = Encoder("utf-8", "surrogateescape", True)  # type: ignore[no-untyped-call]  # redis-py leaves it bare
        self._theirs = PythonRespSerializer(_LONG_BYTES, encoder.encode)

    def pack(self, *args: object) -> list[bytes]:
        """Return the command; its first argument may be several words.

        Raises:
            DataError: an argument is neither text, bytes nor a number.
        """
        if _PLAIN.issuperset(map(type, args)) and " " not in str(args[0]):
            text = f"*{len(args)}\r\n" + "".join([f"${len(word)}\r\n{word}\r\n" for word in map(str, args)])
            if text.isascii():  # then characters are bytes, and the lengths are right
                return [text.encode("ascii")]
        packed: list[bytes] = self._theirs.pack(*args)  # type: ignore[no-untyped-call]  # as above
        return packed
