"""Keeps the leases of jobs that bring no tokens: a long prompt, a stalled engine, a wait for room.

Owns one thread with its own clock, independent of sweeps. Jobs that bring tokens renew with each emit and are left
alone. Each renewal also reads the job's cancel flag, so a job that only waits can be cancelled too.
"""

from __future__ import annotations

import logging
import threading
import time

from lamella_worker.delivery import Delivery
from lamella_worker.job_table import JobTable
from lamella_worker.registry import RegistryAway
from lamella_worker.stoppable_thread import StoppableThread

log = logging.getLogger(__name__)

LONGEST_INTERVAL_S = 1.0


class LeaseKeeper:
    """A thread that renews every listed job at least once in a third of the lease."""

    def __init__(self, table: JobTable, delivery: Delivery, lease_s: float) -> None:
        self._table = table
        self._delivery = delivery
        self._interval_s = min(lease_s / 6, LONGEST_INTERVAL_S)  # looks twice as often as it must renew
        self._thread = StoppableThread("lease-keeper", self._run)
        self._is_away = False

    def start(self) -> None:
        """Start renewing."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stop renewing; waits at most `timeout_s` seconds for a renewal under way."""
        self._thread.stop(timeout_s)

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(self._interval_s):
            try:
                self.renew_quiet_jobs()
            except Exception:
                # One bad round must not let every lease run out; the next round tries all of them again.
                log.exception("renewing leases failed")

    def renew_quiet_jobs(self) -> None:
        """Renew the jobs that were not renewed within the last interval."""
        now = time.monotonic()
        quiet = [j for j in self._table.jobs() if not j.is_settled and now - j.renewed_at >= self._interval_s]
        if not quiet:
            return
        try:
            self._delivery.renew(quiet)
            self._is_away = False
        except RegistryAway as error:
            if not self._is_away:
                log.warning("leases of %d jobs are not renewed: %s", len(quiet), error)
            self._is_away = True
