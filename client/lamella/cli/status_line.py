"""A line under an answer that is being written: how far it is and how fast; on a terminal only.

Owns the escape sequences, which every terminal since the VT100 understands: the line stands below the cursor, is wiped
before text is written and drawn again after it, so that the text scrolls as if the line were not there. Neighbours:
`follow` (which writes the text).
"""

from __future__ import annotations

import shutil
import sys
import time

from lamella.cli.output import printable

DRAW_EVERY_S = 0.1
_WIPE = "\033[J"  # from the cursor to the end of the screen
_ROOM_BELOW = "\033D\033[A"  # one line down, scrolling if there is none, and up again
_SAVE, _RESTORE = "\0337", "\0338"
_BELOW = "\033[B\r"
_DIM, _PLAIN = "\033[2m", "\033[0m"


class StatusLine:
    """Shows a text below the cursor; where stdout or stderr is no terminal it does nothing."""

    def __init__(self) -> None:
        self._is_shown = False
        self._is_live = sys.stdout.isatty() and sys.stderr.isatty()
        self._drawn_at = float("-inf")

    def wipe(self) -> None:
        """Take the line away, so that text can be written."""
        if self._is_shown:
            self._write(_WIPE)
            self._is_shown = False

    def draw(self, text: str, *, at_once: bool = False) -> None:
        """Show a text; calls that follow each other closely are left out."""
        now = time.monotonic()
        if not self._is_live or (now - self._drawn_at < DRAW_EVERY_S and not at_once):
            return
        self._drawn_at = now
        room = max(1, shutil.get_terminal_size().columns - 1)
        line = printable(text).replace("\n", " ")[:room]
        self._write(f"{_ROOM_BELOW}{_SAVE}{_BELOW}{_WIPE}{_DIM}{line}{_PLAIN}{_RESTORE}")
        self._is_shown = True

    def _write(self, text: str) -> None:
        sys.stdout.write(text)  # the same terminal as the text's, so that both stay in order
        sys.stdout.flush()
