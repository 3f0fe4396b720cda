"""The text a model is measured on: where it comes from, its tokens, and the windows that both models see.

Owns the rule for windows. Each has the tokens that a text begins with (most often one, where the model expects any),
then text; the first half of that is context only, and what follows it is scored. The next window begins where its own
scored part joins on, so every token behind the first half window is scored once, with at least half a window before it.
`quality` runs the windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella_engine.errors import CheckpointError, OptionError
from lamella_engine.texts import DEFAULT_TEXT, DEFAULT_TITLE

MIN_WINDOW = 8  # tokens, with those that every text begins with
MAX_CHARACTERS = 1 << 26  # of a file that are read: far more than anyone scores
_FIRST_CHARACTERS = 8  # tokenised for each token that is wanted, to begin with
_MORE = 4  # times as many if that was not enough
_MARGIN = 32  # tokens at the end of a text that was cut: the cut may have changed them
_PROBE = "a"


@dataclass(frozen=True)
class QualityText:
    """A text and what it is called in a report."""

    title: str
    content: str

    @property
    def digest(self) -> str:
        """SHA-256 in hex."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Window:
    """Tokens that a model reads, and those that are to follow the last ``len(targets)`` of them, one each."""

    token_ids: tuple[int, ...]
    targets: tuple[int, ...]


def read_text(path: Path | None) -> QualityText:
    """The text in `path`, or the one that ships.

    Raises:
        OptionError: it is no text in UTF-8.
        OSError: it cannot be read.
    """
    if path is None:
        return QualityText(DEFAULT_TITLE, DEFAULT_TEXT.read_text(encoding="utf-8"))
    try:
        with path.open(encoding="utf-8-sig") as file:
            return QualityText(str(path), file.read(MAX_CHARACTERS))
    except UnicodeDecodeError as error:
        raise OptionError(
            f"--text: {path} is not text in UTF-8 ({error.reason} at byte {error.start}); convert it, for example with "
            "iconv -t UTF-8"
        ) from error


def windows_of(
    text: QualityText, tokenizer: Any, vocabulary: int, window_tokens: int, scored_tokens: int
) -> list[Window]:
    """The windows of `window_tokens` tokens, the last one perhaps shorter, in which `scored_tokens` tokens are scored.

    Fewer are scored where the text ends before.

    Raises:
        OptionError: there are not two windows of it, or `scored_tokens` are less than two windows'.
        CheckpointError: the tokenizer gives tokens that the model does not know.
    """
    prefix = begins_with(tokenizer)
    room = window_tokens - len(prefix)
    if room < 4:
        raise OptionError(
            f"--window is {window_tokens}, of which {len(prefix)} are what every text begins with; give at least "
            f"{len(prefix) + MIN_WINDOW}"
        )
    context = room - room // 2
    stride = room - context
    if scored_tokens < 2 * stride:
        raise OptionError(
            f"--tokens is {scored_tokens}: an interval needs two windows, which score {2 * stride} tokens; give at "
            f"least that many, or a smaller --window than {window_tokens}"
        )
    ids = first_ids(tokenizer, text.content, context + scored_tokens)
    if len(ids) < 2 * room:
        raise OptionError(
            f"{text.title} has {len(ids)} tokens, and two windows of {window_tokens} need {2 * room}; give a longer "
            "text with --text, or a smaller --window"
        )
    check_known((*prefix, *ids), vocabulary)
    blocks = [ids[start : start + room] for start in range(0, len(ids) - context, stride)]
    return [Window((*prefix, *block[:-1]), tuple(block[context:])) for block in blocks]


def first_ids(tokenizer: Any, content: str, count: int) -> list[int]:
    """The first `count` tokens of `content`, or all, without any that are not of the text; no more of it is looked at.

    A cut may change the tokens before it, so some are left over.
    """
    size = max(1, count * _FIRST_CHARACTERS)
    while True:
        ids: list[int] = list(tokenizer(content[:size], add_special_tokens=False, verbose=False)["input_ids"])
        if size >= len(content) or len(ids) >= count + _MARGIN:
            return ids[:count]
        size *= _MORE


def begins_with(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that the tokenizer puts before a text: what the model was trained to see first."""
    plain = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_PROBE, add_special_tokens=True)["input_ids"])
    places = range(len(whole) - len(plain) + 1)
    return tuple(whole[: next((start for start in places if whole[start : start + len(plain)] == plain), 0)])


def check_known(ids: Sequence[int], vocabulary: int) -> None:
    """Refuse tokens that are not among the model's `vocabulary`.

    Raises:
        CheckpointError: there are some.
    """
    unknown = max(ids)
    if unknown >= vocabulary:
        raise CheckpointError(
            f"the tokenizer gives token {unknown} for this text, and the model knows the tokens 0 to {vocabulary - 1}: "
            "they do not belong together; fetch or import the model again with its own tokenizer"
        )
