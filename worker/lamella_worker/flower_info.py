"""What Flower's worker page, and ``celery inspect stats``, show of the engine beside Celery's own figures.

Owns one step of the consumer that does nothing but answer. The app carries what it tells as `lamella_info`, which
returns the same WorkerInfo that the heartbeat writes.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps


class FlowerInfo(bootsteps.StartStopStep):  # type: ignore[misc]  # celery publishes no types
    """Adds the worker's own figures to Celery's statistics, under ``lamella``."""

    def info(self, consumer: Any) -> dict[str, object]:
        """Return what the heartbeat tells, as plain data."""
        return {"lamella": consumer.app.lamella_info().model_dump(mode="json")}
