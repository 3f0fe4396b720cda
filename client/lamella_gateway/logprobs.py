"""Log-probabilities in OpenAI's three shapes: of chat, of completions, of responses.

A worker tells the text of each token beside its id; what an older one leaves out is shown as ``token_id:N``.
"""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import TypedDict

from lamella import TokenLogprob

LEAST = -9999.0  # what JSON has no number for


class TopLogprob(TypedDict):
    """An alternative at one position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """One position of an answer."""

    top_logprobs: list[TopLogprob]


class CompletionLogprobs(TypedDict):
    """All positions of a completion, in columns."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


def chat_logprobs(positions: Iterable[TokenLogprob]) -> list[ChatLogprob]:
    """Return positions as chat and responses show them."""
    return [
        {**_entry(p.token_id, p.text, p.logprob), "top_logprobs": [_entry(*each) for each in _alternatives(p)]}
        for p in positions
    ]


def completion_logprobs(positions: Iterable[TokenLogprob], offset: int, asked: int) -> CompletionLogprobs:
    """Return positions as completions show them; `offset` is where their text begins."""
    columns = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[] if asked else None, text_offset=[])
    for position in positions:
        shown = _shown(position.token_id, position.text)
        columns["tokens"].append(shown)
        columns["token_logprobs"].append(max(position.logprob, LEAST))
        columns["text_offset"].append(offset)
        if columns["top_logprobs"] is not None:
            tops = {_shown(token_id, text): max(value, LEAST) for token_id, text, value in _alternatives(position)}
            columns["top_logprobs"].append(tops)
        offset += len(position.text or "")
    return columns


def _alternatives(position: TokenLogprob) -> list[tuple[int, str | None, float]]:
    texts: tuple[str | None, ...] = position.top_texts or (None,) * len(position.top)
    return [(token_id, text, value) for (token_id, value), text in zip(position.top, texts, strict=True)]


def _entry(token_id: int, text: str | None, logprob: float) -> TopLogprob:
    shown = _shown(token_id, text)
    return TopLogprob(token=shown, logprob=max(logprob, LEAST), bytes=list(shown.encode()))


def _shown(token_id: int, text: str | None) -> str:
    return f"token_id:{token_id}" if text is None else text
