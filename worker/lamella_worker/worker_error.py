"""What ends a worker before it serves."""

from __future__ import annotations


class WorkerError(Exception):
    """The worker cannot serve; the message says what, why and what to do.

    Attributes:
        is_out_of_memory: memory was short, so that a smaller engine may open.
    """

    def __init__(self, message: str, *, is_out_of_memory: bool = False) -> None:
        self.is_out_of_memory = is_out_of_memory
        super().__init__(message)
