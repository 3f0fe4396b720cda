"""The worker's one Celery task: hands a job id to the session and says what becomes of the message."""

from __future__ import annotations

import logging
from typing import Any

from celery import Celery
from celery.exceptions import Reject

from lamella.keys import TASK_NAME, TRACE_HEADER, queue_name
from lamella_worker.session import Session, Verdict

log = logging.getLogger(__name__)


def add_generate_task(app: Celery, session: Session) -> None:
    """Register the task `lamella.generate` on the app."""

    @app.task(name=TASK_NAME, shared=False, bind=True)  # type: ignore[untyped-decorator]  # celery publishes no types
    def generate(task: Any, job_id: str) -> None:
        if not isinstance(job_id, str):
            log.error("a message that names no job is dropped")
        elif session.run(job_id, _trace_of(task), _model_of(task)) is Verdict.REQUEUE:
            raise Reject("given back", requeue=True)


def _trace_of(task: Any) -> str | None:
    """The W3C traceparent in the message's headers."""
    trace = task.request.get(TRACE_HEADER)
    return trace if isinstance(trace, str) else None


def _model_of(task: Any) -> str | None:
    """The model whose queue the message came from."""
    queue = (task.request.delivery_info or {}).get("routing_key")
    prefix = queue_name("")
    return queue.removeprefix(prefix) if isinstance(queue, str) and queue.startswith(prefix) else None
