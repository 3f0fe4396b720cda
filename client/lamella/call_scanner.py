"""Reads one call of a tool, ``{"name": ..., "arguments": {...}}``, character by character, as a model writes it.

Owns nothing but that object: its name, the text of its arguments so far, and where it ends. `tool_calls` finds where
one begins.
"""

from __future__ import annotations

import json

_ARGUMENTS = ("arguments", "parameters")


class CallScanner:
    """One JSON object in the making.

    Attributes:
        text: all characters so far.
        name: the function's name, once it is known.
        arguments: JSON text of the arguments so far, without space around it.
        is_done: whether the object has ended.
    """

    def __init__(self) -> None:
        self.text = ""
        self.name: str | None = None
        self.arguments = ""
        self.is_done = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._key: str | None = None  # of the value that is being read; None while a key is
        self._part = ""  # of that key or value

    def push(self, character: str) -> None:
        """Read on by one character; the first one is the opening brace."""
        self.text += character
        if self._in_string:
            self._read_string(character)
        elif character in "{[":
            self._depth += 1
            if self._depth > 1:
                self._add(character)
        elif character in "}]":
            self._close(character)
        elif self._depth == 1 and character == ":" and self._key is None:
            self._key, self._part = _text_of(self._part), ""
        elif self._depth == 1 and character == ",":
            self._end_value()
        else:
            self._in_string = character == '"'
            self._add(character)

    def _read_string(self, character: str) -> None:
        self._add(character)
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._in_string = False

    def _close(self, character: str) -> None:
        self._depth -= 1
        if self._depth > 0:
            self._add(character)
            return
        self._end_value()
        self.is_done = True

    def _add(self, character: str) -> None:
        self._part += character
        if self._key in _ARGUMENTS and not self._part.lstrip().startswith('"'):
            self.arguments = self._part.strip()

    def _end_value(self) -> None:
        if self._key == "name":
            self.name = _text_of(self._part)
        elif self._key in _ARGUMENTS and self._part.lstrip().startswith('"'):
            self.arguments = _text_of(self._part) or ""  # JSON within JSON
        self._key, self._part = None, ""


def _text_of(part: str) -> str | None:
    try:
        found = json.loads(part)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, str) else None
