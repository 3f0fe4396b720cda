"""Finds the calls of tools in an answer while it streams, in each of the ways in which models write them.

Owns what of an answer is text and what is a call. The stream's first event tells the way (`TokenEvent.tool_format`);
an answer without one is text. What begins like a call and turns out to be none is given back as text. Neighbours:
`call_section` (what stands between text and text), `completion` (which gathers the deltas).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from lamella.call_section import BEGINNINGS, PYTHON_TAG, CallSection, FoundCall
from lamella.chat import FunctionCall, ToolCall
from lamella.messages import ToolFormat

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_CHARS = 9  # what the strictest templates, Mistral's, take


@dataclass(frozen=True)
class CallDelta:
    """More of one call: the first delta of a call has its id and name, each has the arguments' text that came."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class AnswerDelta(NamedTuple):
    """What some text of an answer adds: visible text, and parts of calls, in order."""

    text: str
    calls: tuple[CallDelta, ...] = ()


class ToolCallParser:
    """The text and the calls of one answer.

    Args:
        tool_format: how the model writes calls.
        job_id: what the calls' ids are made from, so that every reader of a job finds the same ones.
    """

    def __init__(self, tool_format: ToolFormat, job_id: str) -> None:
        self._format = tool_format
        self._job_id = job_id
        self._begin = BEGINNINGS[tool_format]
        self._pending = ""  # read, and not yet told what it is
        self._section: CallSection | None = None
        self._found: list[FoundCall] = []
        self._told: list[int] = []  # characters of each call's arguments that deltas had
        self._is_text = False  # an answer that is no call from its beginning, where calls have no mark

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls so far."""
        return tuple(
            ToolCall(id=self._id(index), function=FunctionCall(name=call.name, arguments=call.arguments or "{}"))
            for index, call in enumerate(self._found)
        )

    def push(self, text: str) -> AnswerDelta:
        """Read on."""
        self._pending += text
        return self._read(is_end=False)

    def end(self) -> AnswerDelta:
        """The answer has ended: what was held back, as what it is."""
        return self._read(is_end=True)

    def _read(self, *, is_end: bool) -> AnswerDelta:
        texts: list[str] = []
        while True:
            if self._section is None:
                texts.append(self._read_text(is_end=is_end))
                if self._section is None:
                    break
            texts.append(self._read_section(self._section, is_end=is_end))
            if self._section is not None:
                break
        return AnswerDelta("".join(texts), tuple(self._deltas()))

    def _read_text(self, *, is_end: bool) -> str:
        """Take text up to where a call begins, or may; opens a section where one does."""
        if not self._begin:
            return self._read_unmarked(is_end=is_end)
        at = self._pending.find(self._begin)
        if at >= 0:
            text, self._pending = self._pending[:at], self._pending[at + len(self._begin) :]
            self._section = CallSection(self._format)
            return "" if self._found and not text.strip() else text
        held = 0 if is_end else _overlap(self._pending, self._begin)
        text, rest = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        if self._found and not text.strip():  # space behind a call is no text
            self._pending = "" if is_end else self._pending
            return ""
        self._pending = rest
        return text

    def _read_unmarked(self, *, is_end: bool) -> str:
        """Calls without a mark are calls only where the answer begins with one."""
        bare = self._pending.lstrip().removeprefix(PYTHON_TAG).lstrip()
        if not self._is_text and not self._found:
            if bare.startswith("{"):
                self._pending, self._section = bare, CallSection(self._format)
                return ""
            if not is_end and (not bare or PYTHON_TAG.startswith(bare)):
                return ""
        text, self._pending = self._pending, ""
        if self._found and not self._is_text and not text.strip():
            return ""
        self._is_text = self._is_text or bool(text)
        return text

    def _read_section(self, section: CallSection, *, is_end: bool) -> str:
        """Take a section's characters; the text it turns out to be, if it is none."""
        known = len(section.calls)
        taken = 0
        while taken < len(self._pending) and not section.is_over:
            section.push(self._pending[taken])
            taken += 1
        self._pending = self._pending[taken:]
        if is_end and not section.is_over:
            section.end()
        new = section.calls[known:]
        self._found += new
        self._told += [-1] * len(new)
        if section.is_over:
            self._section = None
            self._is_text = self._is_text or bool(section.rest.strip())
            return section.rest
        return ""

    def _deltas(self) -> list[CallDelta]:
        deltas = []
        for index, call in enumerate(self._found):
            first = self._told[index] < 0
            known = max(0, self._told[index])
            if first or len(call.arguments) > known:
                name = call.name if first else None
                deltas.append(CallDelta(index, self._id(index) if first else None, name, call.arguments[known:]))
                self._told[index] = len(call.arguments)
        return deltas

    def _id(self, index: int) -> str:
        digest = hashlib.blake2b(f"{self._job_id} {index}".encode(), digest_size=_ID_CHARS).digest()
        return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest)


def _overlap(text: str, begin: str) -> int:
    """Length of the longest end of `text` that is a beginning of `begin`."""
    return next((size for size in range(min(len(text), len(begin) - 1), 0, -1) if text.endswith(begin[:size])), 0)
