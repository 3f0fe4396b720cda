"""Redis commands as bytes, for connections that send a script call for every token.

Owns the framing (RESP: a count, then each word with its length), which hiredis does in C; what it does not take is left
to redis-py, whose own use of hiredis refuses bytes that are no text. `connection` and the worker's `registry` open
connections with it.
"""

from __future__ import annotations

import hiredis
from redis._parsers import Encoder
from redis.connection import PythonRespSerializer

_LONG_BYTES = 6000  # redis-py's own bound, above which it does not join


class CommandPacker:
    """What redis-py asks of a packer; text is UTF-8, bytes that are none included, as they are read."""

    def __init__(self) -> None:
        encoder = Encoder("utf-8", "surrogateescape", True)  # type: ignore[no-untyped-call]  # redis-py leaves it bare
        self._theirs = PythonRespSerializer(_LONG_BYTES, encoder.encode)

    def pack(self, *args: object) -> list[bytes]:
        """Return the command; its first argument may be several words.

        Raises:
            DataError: an argument is neither text, bytes nor a number.
        """
        if " " not in str(args[0]):
            try:
                return [hiredis.pack_command(args)]  # type: ignore[arg-type]  # its stub says one word, and no bool
            except (TypeError, UnicodeEncodeError):
                pass  # bytes that are no text, or what nobody takes: redis-py tells them apart
        packed: list[bytes] = self._theirs.pack(*args)  # type: ignore[no-untyped-call]  # as above
        return packed
