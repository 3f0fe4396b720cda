"""Celery's consumer, which goes back to its server at a walking pace, and tells monitors several things at once.

Owns the pause between two tries. Celery itself waits between tries to reach a server that does not answer, but not
between tries at one that answers with a refusal (see `transport`), of which there are hundreds a minute otherwise. Owns
also how long events about tasks are gathered: Celery publishes each by itself, a quarter of a worker's time where jobs
are short.
"""

from __future__ import annotations

import threading
from typing import Any

from celery.worker.consumer import Consumer

PAUSE_S = 1.0  # between a failure and the next try; a stop by signal waits for it
EVENTS_S = 0.25  # for which events about tasks are gathered, unless they are many


class PatientConsumer(Consumer):  # type: ignore[misc]  # celery publishes no types
    """Celery's consumer with a pause after each failure, and events in groups."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_flush_due = False

    def on_send_event_buffered(self) -> None:
        """See that what is gathered is published soon; called from any thread."""
        if self.hub and not self._is_flush_due:
            self._is_flush_due = True
            self.hub.call_soon(self.hub.call_later, EVENTS_S, self._publish_gathered)

    def on_close(self) -> None:
        """Forget the connection's timers, of which one may be for events."""
        super().on_close()
        self._is_flush_due = False

    def _publish_gathered(self) -> None:
        self._is_flush_due = False  # first, so that an event that comes meanwhile is seen to
        self._flush_events()

    def on_connection_error_before_connected(self, exc: Any) -> None:
        """Log the failure, and wait."""
        super().on_connection_error_before_connected(exc)
        threading.Event().wait(PAUSE_S)

    def on_connection_error_after_connected(self, exc: Any) -> None:
        """Log the failure, drop the connection, and wait."""
        super().on_connection_error_after_connected(exc)
        threading.Event().wait(PAUSE_S)
