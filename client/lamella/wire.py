"""What every message on the wire has in common: frozen, no unknown keys, no silent conversion, text that is text.

Owns the base class and the bounds that several messages share. Neighbours: `messages` and the parts of requests that
have files of their own (`chat`, `response_format`, `embedding`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_PROMPT_CHARS = 4_000_000
MAX_TOKEN_ID = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]


class Wire(BaseModel):
    """Base of all messages: frozen, no unknown keys, no silent conversion."""

    # An error's text never repeats what was wrong: it may be a prompt, and errors end up in logs.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


def check_unicode(text: str, what: str) -> None:
    """Raise ValueError where `text` cannot be written as UTF-8; `what` names it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid text (a lone surrogate at character {error.start})") from error


def count_characters(what: str, most: int, *texts: str) -> None:
    """Raise ValueError where `texts` have more than `most` characters together."""
    if sum(map(len, texts)) > most:
        raise ValueError(f"{what} has more than {most} characters")
