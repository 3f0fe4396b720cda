"""The part of an answer in which tools are called, from its mark to its end, for each way of writing it.

Owns what may stand around the calls; `call_scanner` reads each one's JSON, `tool_calls` finds where a section begins.
"""

from __future__ import annotations

from lamella.call_scanner import CallScanner
from lamella.messages import ToolFormat

PYTHON_TAG = "<|python_tag|>"
BEGINNINGS: dict[ToolFormat, str] = {
    "hermes": "<tool_call>",
    "llama3": "",
    "mistral": "[TOOL_CALLS]",
    "mistral_args": "[TOOL_CALLS]",
}
_HERMES_END = "</tool_call>"
_ARGS = "[ARGS]"
_CALL_ID = "[CALL_ID]"
_MAX_HEAD_CHARS = 300  # between the mark and a call's arguments
_BEFORE: dict[ToolFormat, str] = {"hermes": " \n\r\t", "llama3": "", "mistral": " \n\r\t[", "mistral_args": " \n\r\t"}
_BETWEEN: dict[ToolFormat, str] = {"hermes": "", "llama3": " \n\r\t;", "mistral": " \n\r\t,", "mistral_args": ""}


class FoundCall:
    """One call; `arguments` grow while it is read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.arguments = ""


class CallSection:
    """One section in the making, its mark already read.

    Attributes:
        calls: those found in it, the last one perhaps still growing.
        is_over: whether it has ended.
        rest: then, what of it is text after all.
    """

    def __init__(self, tool_format: ToolFormat) -> None:
        self.calls: list[FoundCall] = []
        self.is_over = False
        self.rest = ""
        self._format = tool_format
        self._raw = BEGINNINGS[tool_format]  # since the last call
        self._head = ""  # a name before its arguments
        self._name: str | None = None
        self._scanner: CallScanner | None = None
        self._is_open = False  # the call that is being read is in `calls`

    def push(self, character: str) -> None:
        """Read on by one character."""
        self._raw += character
        if self._scanner is not None:
            self._scan(self._scanner, character)
        elif self._format == "mistral_args" and self._name is None:
            self._read_head(character)
        elif self.calls:
            self._read_tail(character)
        elif character == "{":
            self._open(character)
        elif character not in _BEFORE[self._format]:
            self._give_back()

    def end(self) -> None:
        """The answer has ended within the section."""
        if self._is_open or (self.calls and self._scanner is None):
            self._raw = ""  # cut short, it stays the call that it is
        self._give_back()

    def _open(self, character: str) -> None:
        self._scanner = CallScanner()
        self._scan(self._scanner, character)

    def _scan(self, scanner: CallScanner, character: str) -> None:
        scanner.push(character)
        name = scanner.name if self._format != "mistral_args" else self._name
        arguments = scanner.arguments if self._format != "mistral_args" else scanner.text
        if name and not self._is_open and (arguments or scanner.is_done):
            self.calls.append(FoundCall(name))
            self._is_open = True
        if self._is_open:
            self.calls[-1].arguments = arguments
        if not scanner.is_done:
            return
        if not self._is_open:
            self._give_back()
            return
        self._scanner, self._is_open, self._raw = None, False, ""
        self.is_over = self._format == "mistral_args"

    def _read_head(self, character: str) -> None:
        self._head += character
        if self._head.endswith(_ARGS):
            self._name = self._head.removesuffix(_ARGS).partition(_CALL_ID)[0].strip()
        if self._name == "" or len(self._head) > _MAX_HEAD_CHARS:
            self._give_back()

    def _read_tail(self, character: str) -> None:
        """What follows a call: another one, the section's end, or text."""
        if self._format == "hermes":
            tail = self._raw.lstrip()
            if tail == _HERMES_END:
                self.is_over = True
            elif not _HERMES_END.startswith(tail):
                self._give_back()
        elif self._format == "mistral" and character == "]":
            self.is_over = True
        elif character == "{":
            self._open(character)
        elif character not in _BETWEEN[self._format]:
            self._give_back()

    def _give_back(self) -> None:
        self.is_over = True
        self.rest = self._raw
