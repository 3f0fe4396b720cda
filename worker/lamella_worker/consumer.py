"""Celery's consumer, which goes back to its server at a walking pace.

Owns the pause between two tries. Celery itself waits between tries to reach a server that does not answer, but not
between tries at one that answers with a refusal (see `transport`), of which there are hundreds a minute otherwise.
"""

from __future__ import annotations

import threading
from typing import Any

from celery.worker.consumer import Consumer

PAUSE_S = 1.0  # between a failure and the next try; a stop by signal waits for it


class PatientConsumer(Consumer):  # type: ignore[misc]  # celery publishes no types
    """Celery's consumer with a pause after each failure."""

    def on_connection_error_before_connected(self, exc: Any) -> None:
        """Log the failure, and wait."""
        super().on_connection_error_before_connected(exc)
        threading.Event().wait(PAUSE_S)

    def on_connection_error_after_connected(self, exc: Any) -> None:
        """Log the failure, drop the connection, and wait."""
        super().on_connection_error_after_connected(exc)
        threading.Event().wait(PAUSE_S)
