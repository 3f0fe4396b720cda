"""Stops the worker within its budget: jobs go back to the queue with their tokens, then the process ends.

Owns what a signal means. The first SIGTERM or SIGINT drains: no job is taken any more, at the next sweep boundary
every running one is released with its attempt given back, Celery stops. When the budget is nearly spent, jobs are
released as they stand; when it is spent, the process ends. A second signal, or SIGQUIT, ends it at once: the leases
run out and the jobs go on elsewhere all the same.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType

from celery.worker import state

from lamella_worker.session import Session

log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILURE = 1
GIVE_UP_SHARE = 0.5  # of the budget; what is left is for releasing, for Celery and for closing the engine
_LOOK_S = 1.0


class Drain:
    """One thread that waits for the word to stop, and then sees to it that the process does.

    Args:
        session: whose jobs are given back.
        budget_s: seconds from the word to the end of the process.
        end_process: ends the process at once with an exit code.
    """

    def __init__(self, session: Session, budget_s: float, end_process: Callable[[int], None] = os._exit) -> None:
        self._session = session
        self._budget_s = budget_s
        self._end_process = end_process
        self._requests: queue.SimpleQueue[str] = queue.SimpleQueue()  # its put is safe in a signal handler
        self._has_begun = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)

    def start(self) -> None:
        """Start listening."""
        self._thread.start()

    def install(self) -> None:
        """Take over SIGTERM, SIGINT and SIGQUIT; call it from the main thread."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGQUIT, self._on_signal)

    def request(self, why: str, exit_code: int = EXIT_OK) -> None:
        """Begin to drain; safe in signal handlers and from any thread, and only the first call counts."""
        if state.should_stop is None:
            state.should_stop = exit_code
        self._requests.put(why)

    def close(self, timeout_s: float) -> None:
        """The worker has stopped: call off the end by force."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._has_begun or number == signal.SIGQUIT:
            self._end_process(EXIT_FAILURE)
        self._has_begun = True
        self.request(signal.Signals(number).name)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                why = self._requests.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            self._drain(why)
            return

    def _drain(self, why: str) -> None:
        log.info("draining (%s): running jobs go back to the queue within %g s", why, self._budget_s)
        self._session.begin_drain()
        if not self._session.wait_idle(GIVE_UP_SHARE * self._budget_s):
            log.warning("the sweep or Redis takes too long; jobs are released as they stand")
        self._session.give_up()
        if not self._closed.wait((1 - GIVE_UP_SHARE) * self._budget_s):
            log.error("the worker did not stop within %g s and is ended", self._budget_s)
            logging.shutdown()
            self._end_process(EXIT_FAILURE)
