"""One claimed job on this worker: its fence, its next sequence number, and how its life here ends.

Owns the job's state in this process and nothing shared. The task's thread makes it and waits on it; the publisher
counts `next_seq`; whoever learns the end first settles it, and only the first counts.
"""

from __future__ import annotations

import threading
import time
from enum import Enum

from lamella.job_seal import JobSeal
from lamella.messages import Cancelled, Failed
from lamella.registry_calls import deadline_event
from lamella_worker.engine_port import SweepEngine
from lamella_worker.log_context import sequence_id


class Outcome(Enum):
    """How a job's life on this worker ended."""

    ENDED = "ended"  # its terminal event is stored
    SET_ASIDE = "set aside"  # this worker lacks the key; to be released as if given back, for another one to take
    LOST = "lost"  # its record is gone or another worker has it; nothing of ours is wanted
    GIVEN_BACK = "given back"  # to be released with its attempt returned
    ATTEMPT_FAILED = "attempt failed"  # to be released with its attempt counted


class RunningJob:
    """A job under our claim; flags are set once and never cleared.

    Attributes:
        model: the one whose queue it came from.
        engine: the one that has its sequence, set by the job's own thread; None before.
    """

    def __init__(
        self, job_id: str, fence: int, next_seq: int, attempts: int, seal: JobSeal | None = None, model: str = ""
    ) -> None:
        self.model = model
        self.engine: SweepEngine | None = None
        self.seal = seal or JobSeal(None)
        self.job_id = job_id
        self.fence = fence
        self.attempts = attempts
        self.sequence_id = sequence_id(job_id, fence, attempts)  # coming back before the old one left, it is another
        self.next_seq = next_seq  # only the thread that delivers the job's events writes it
        self.renewed_at = time.monotonic()
        self._cancel_requested = threading.Event()
        self._last_word: Cancelled | Failed = Cancelled()
        self._settled = threading.Event()
        self._lock = threading.Lock()
        self._outcome: Outcome | None = None

    @property
    def is_cancel_requested(self) -> bool:
        """True once a client's cancel was seen, or the deadline had passed."""
        return self._cancel_requested.is_set()

    @property
    def is_settled(self) -> bool:
        """True once the outcome is known."""
        return self._settled.is_set()

    @property
    def last_word(self) -> Cancelled | Failed:
        """The terminal event of a job that is stopped: by its deadline, or else by a client's cancel."""
        with self._lock:
            return self._last_word

    def request_cancel(self) -> bool:
        """Note a client's cancel; True the first time."""
        return self._stop(Cancelled())

    def stop_overdue(self) -> bool:
        """Note that the deadline has passed; True the first time."""
        return self._stop(deadline_event())

    def _stop(self, last_word: Cancelled | Failed) -> bool:
        with self._lock:
            is_first = not self._cancel_requested.is_set()
            if is_first:
                self._last_word = last_word
            self._cancel_requested.set()
        return is_first

    def settle(self, outcome: Outcome) -> bool:
        """Decide how the job's life here ends; True if it was open until now."""
        with self._lock:
            if self._outcome is not None:
                return False
            self._outcome = outcome
        self._settled.set()
        return True

    def wait(self, timeout_s: float) -> Outcome | None:
        """Wait for the outcome; None if it is not known after `timeout_s` seconds."""
        self._settled.wait(timeout_s)
        return self._outcome
