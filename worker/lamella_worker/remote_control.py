"""What a worker lets itself be asked over Celery's remote control: questions, no orders.

Whoever may speak to the broker as a monitor may broadcast to all workers, and Celery would let him end them, drop
their jobs or change their queues. Lamella needs none of that (jobs are cancelled through their record, a worker is
stopped by a signal), so a worker answers what only looks and refuses the rest. Owns that list.
"""

from __future__ import annotations

import logging
from typing import Any

from kombu import pidbox

log = logging.getLogger(__name__)

QUESTIONS = frozenset(
    (
        "active",
        "active_queues",
        "clock",
        "conf",
        "disable_events",  # events are only news of tasks, and a monitor turns them on and off for itself
        "enable_events",
        "heartbeat",
        "ping",
        "query_task",
        "registered",
        "report",
        "reserved",
        "revoked",
        "scheduled",
        "stats",
    )
)


class LookOnlyNode(pidbox.Node):
    """A remote-control mailbox that answers questions and refuses orders."""

    def handle_message(self, body: Any, message: Any = None) -> Any:
        """Answer one message, unless it is not of the form of one."""
        if not isinstance(body, dict) or not isinstance(body.get("method"), str):
            log.warning("a remote-control message that is none is dropped")
            return None
        return super().handle_message(body, message)  # type: ignore[no-untyped-call]  # kombu has few types

    def dispatch(
        self, method: str, arguments: Any = None, reply_to: Any = None, ticket: Any = None, **kwargs: Any
    ) -> Any:
        """Answer a question; an order is answered with a refusal."""
        if method in QUESTIONS:
            return super().dispatch(method, arguments, reply_to, ticket, **kwargs)  # type: ignore[no-untyped-call]  # as above
        log.warning("the order %r over remote control is refused", method[:40])
        reply = {"error": f"this worker answers questions only; {method[:40]!r} is none (stop it by a signal)"}
        if reply_to:
            where = {"exchange": reply_to["exchange"], "routing_key": reply_to["routing_key"]}
            self.reply({self.hostname: reply}, ticket=ticket, **where)  # type: ignore[no-untyped-call]  # as above
        return reply
