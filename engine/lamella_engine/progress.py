"""How long work on a model reports how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then while a model is fetched or built, always from the thread that asked for it."""

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """`phase` says what is being done, such as ``download`` or ``shards``."""
