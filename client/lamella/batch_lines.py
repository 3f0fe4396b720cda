"""Reads the lines of a batch, one at a time: what each asks, or what is wrong with it.

Owns the two forms a line may have, OpenAI's (``custom_id``, ``method``, ``url``, ``body``) and the plain one
(``prompt`` or ``messages``, with sampling keys beside it); does no I/O but reading. Neighbours: `batch_body` (what a
body asks of a job), `batch_run`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO, NamedTuple, NoReturn

from lamella.errors import RequestError

MAX_LINE_BYTES = 32_000_000
MAX_CUSTOM_ID_CHARS = 512
_OPENAI_KEYS = ("custom_id", "method", "url", "body")


class BatchUrl(StrEnum):
    """What a line asks for; PLAIN is not OpenAI's. Which of them a form of lines takes is its own to say."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"
    PLAIN = "plain"


SUBMIT_URLS = (BatchUrl.CHAT, BatchUrl.COMPLETIONS)  # those that become submits


class BatchError(RequestError):
    """A line that cannot be a job.

    Attributes:
        code: machine-readable reason, such as ``invalid_json``.
        param: the key that is wrong, where one is.
        custom_id: the line's, where it could be read.
    """

    def __init__(self, code: str, message: str, param: str | None = None, custom_id: str | None = None) -> None:
        self.code = code
        self.param = param
        self.custom_id = custom_id
        super().__init__(message)


class RawLine(NamedTuple):
    """A line of the file, without its end: `number` counts from 1; `raw` is None where it is too long to be read."""

    number: int
    raw: bytes | None


@dataclass(frozen=True)
class BatchLine:
    """What a line asks; `body` is not looked into yet."""

    number: int
    custom_id: str | None
    url: BatchUrl
    body: dict[str, object]


def raw_lines(file: BinaryIO) -> Iterator[RawLine]:
    """Yield the lines that are not blank; of one that is too long only the end is looked for."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES):
        number += 1
        is_too_long = False
        while len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            is_too_long = True
            raw = file.readline(MAX_LINE_BYTES)
            if not raw or raw.endswith(b"\n"):
                break
        if is_too_long:
            yield RawLine(number, None)
        elif stripped := raw.strip():
            yield RawLine(number, stripped.removeprefix(b"\xef\xbb\xbf") if number == 1 else stripped)


def parse_line(line: RawLine, urls: Sequence[BatchUrl] = SUBMIT_URLS) -> BatchLine:
    """Return what a line asks; `urls` are those it may have.

    Raises:
        BatchError: it is no JSON object of one of the two forms.
    """
    if line.raw is None:
        raise BatchError("line_too_long", f"the line has more than {MAX_LINE_BYTES} bytes")
    record = _object(line.raw)
    if not any(key in record for key in ("url", "method", "body")):
        return _plain(line.number, record)
    custom_id = _custom_id(record.get("custom_id"))
    for key in record:
        if key not in _OPENAI_KEYS:
            raise BatchError(
                "invalid_line", f"unknown key {key[:60]!r}; a line has {', '.join(_OPENAI_KEYS)}", key[:60], custom_id
            )
    if custom_id is None:
        raise BatchError("invalid_line", "custom_id is missing; give each line one of its own", "custom_id")
    if record.get("method") != "POST":
        raise BatchError(
            "invalid_line", f"method is {_shown(record.get('method'))}; only 'POST' can be", "method", custom_id
        )
    url = record.get("url")
    if url not in [each.value for each in urls]:
        known = " and ".join(repr(each.value) for each in urls)
        raise BatchError("invalid_url", f"url is {_shown(url)}; there are {known}", "url", custom_id)
    body = record.get("body")
    if not isinstance(body, dict):
        raise BatchError("invalid_line", f"body is {_shown(body)}; an object belongs there", "body", custom_id)
    return BatchLine(line.number, custom_id, BatchUrl(url), body)


def _plain(number: int, record: dict[str, object]) -> BatchLine:
    custom_id = _custom_id(record.get("custom_id"))
    if "prompt" not in record and "messages" not in record:
        raise BatchError(
            "invalid_line",
            "the line has neither url and body (OpenAI's form) nor prompt or messages (the plain form)",
            custom_id=custom_id,
        )
    body = {key: value for key, value in record.items() if key != "custom_id"}
    return BatchLine(number, custom_id, BatchUrl.PLAIN, body)


def _object(raw: bytes) -> dict[str, object]:
    try:
        record = json.loads(raw.decode(), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise BatchError("invalid_json", f"the line is not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise BatchError("invalid_json", "the line is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise BatchError("invalid_json", f"the line is not JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:
        raise BatchError("invalid_json", f"the line is not JSON: {str(error)[:200]}") from error
    if not isinstance(record, dict):
        raise BatchError("invalid_json", f"the line is {_shown(record)}; an object belongs there")
    return record


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _custom_id(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_CUSTOM_ID_CHARS:
        raise BatchError(
            "invalid_line",
            f"custom_id is {_shown(value)}; use text of 1 to {MAX_CUSTOM_ID_CHARS} characters",
            "custom_id",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BatchError("invalid_line", "custom_id is not valid text (a lone surrogate)", "custom_id") from error
    return value


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
