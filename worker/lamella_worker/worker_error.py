"""What ends a worker before it serves."""

from __future__ import annotations


class WorkerError(Exception):
    """The worker cannot serve; the message says what, why and what to do."""
