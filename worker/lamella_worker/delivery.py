"""Delivers jobs' events to the registry: again and again until Redis takes them, each exactly once.

Owns the retry (store and forward) and what a reply means for the job: a cancel flag, a lost fence, a lost record.
The publisher delivers whole sweeps through it, the session the last word of jobs that never reached the engine. A
repeated emit is harmless because it names its first sequence number.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lamella.messages import JobEvent, Progress
from lamella.registry_calls import EmitReply, EmitStatus, emit_call
from lamella.script_call import ScriptCall
from lamella_worker.failpoints import pass_point
from lamella_worker.job_watch import NO_WATCH, JobWatch
from lamella_worker.registry import Registry, RegistryAway, RegistryBroken
from lamella_worker.running_job import Outcome, RunningJob

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 2.0
COMPLAIN_EVERY_S = 30.0


@dataclass(frozen=True)
class Emission:
    """What one sweep means for one job.

    `outcome` settles the job once `events` are stored (ENDED where the last of them is terminal); None leaves it
    running. `progress` is published once at best, and not stored.
    """

    job: RunningJob
    events: tuple[JobEvent, ...] = ()
    outcome: Outcome | None = None
    progress: Progress | None = None


class Delivery:
    """Sends emissions under their jobs' fences; safe to use from any thread, one thread a job at a time.

    Args:
        registry: where events go.
        lease_s: how long each stored or renewed job stays ours.
        cancel_sequence: tells the engine to drop a sequence; unknown ones are ignored.
        gave_up: set when the process must not wait for Redis any longer.
        watch: is told what is stored, and what is refused.
    """

    def __init__(
        self,
        registry: Registry,
        lease_s: float,
        cancel_sequence: Callable[[str], None],
        gave_up: threading.Event,
        watch: JobWatch = NO_WATCH,
    ) -> None:
        self._registry = registry
        self._lease_ms = int(lease_s * 1000)
        self._cancel_sequence = cancel_sequence
        self._gave_up = gave_up
        self._watch = watch

    def deliver(self, emissions: Sequence[Emission]) -> None:
        """Store and publish all emissions in one round trip, and again what Redis did not take, until it does.

        Returns with every emission stored or its job settled: LOST where the claim or the record is gone, GIVEN_BACK
        where the process gave up waiting for Redis.
        """
        keys = self._registry.keys
        notices = [
            (keys.channel(emission.job.job_id), f"- {emission.progress.model_dump_json(exclude_none=True)}")
            for emission in emissions
            if emission.progress is not None
        ]
        waiting = list(emissions)
        delay_s, complained_at = FIRST_RETRY_S, float("-inf")
        while True:
            failures = self._try(waiting, notices)
            waiting, notices = [emission for emission, _ in failures], []
            if not waiting:
                return
            if time.monotonic() - complained_at > COMPLAIN_EVERY_S:
                complained_at = time.monotonic()
                log.warning("Redis does not take events of %d jobs (%s); they wait", len(waiting), failures[0][1])
            if self._gave_up.wait(delay_s):
                for emission in waiting:
                    emission.job.settle(Outcome.GIVEN_BACK)
                return
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)

    def renew(self, jobs: Sequence[RunningJob]) -> None:
        """Renew the leases of jobs and read their cancel flags; one try.

        Raises:
            RegistryAway: Redis did not answer for at least one of them.
        """
        away: RegistryAway | None = None
        calls = [emit_call(self._registry.keys, job.job_id, job.fence, 0, self._lease_ms) for job in jobs]
        for job, reply in zip(jobs, self._registry.call_many(calls), strict=True):
            if isinstance(reply, RegistryAway):
                away = reply
            elif isinstance(reply, RegistryBroken):
                self._lose(job, str(reply))
            else:
                self._heed(job, reply)
        if away is not None:
            raise away

    def _try(
        self, emissions: Sequence[Emission], notices: Sequence[tuple[str, str]]
    ) -> list[tuple[Emission, RegistryAway]]:
        failures: list[tuple[Emission, RegistryAway]] = []
        is_end = any(e.outcome is Outcome.ENDED for e in emissions)
        pass_point("end" if is_end else "emit")
        replies = self._registry.call_many(map(self._call, emissions), notices)
        pass_point("ended" if is_end else "emitted")
        for emission, reply in zip(emissions, replies, strict=True):
            if isinstance(reply, RegistryAway):
                failures.append((emission, reply))
            elif isinstance(reply, RegistryBroken):
                self._lose(emission.job, str(reply))
            else:
                self._stored(emission, reply)
        return failures

    def _call(self, emission: Emission) -> ScriptCall[EmitReply]:
        job = emission.job
        return emit_call(
            self._registry.keys,
            job.job_id,
            job.fence,
            job.next_seq,
            self._lease_ms,
            emission.events,
            job.seal.encode,
        )

    def _stored(self, emission: Emission, reply: EmitReply) -> None:
        job = emission.job
        if reply.status is EmitStatus.OK:
            job.next_seq += len(emission.events)
            self._tell(emission)
            if emission.outcome is not None:
                job.settle(emission.outcome)
                return
        self._heed(job, reply)

    def _tell(self, emission: Emission) -> None:
        if emission.progress is not None:
            progress = emission.progress
            self._watch.prefilled(emission.job, progress.prefilled_tokens, progress.prompt_tokens)
        if emission.events:
            self._watch.stored(emission.job, emission.events)

    def _heed(self, job: RunningJob, reply: EmitReply) -> None:
        match reply.status:
            case EmitStatus.OK:
                job.renewed_at = time.monotonic()
                if reply.cancel_requested and job.request_cancel():
                    log.info("job=%s cancel requested", job.job_id)
                    self._cancel_sequence(job.sequence_id)
                elif reply.is_overdue and job.stop_overdue():
                    log.info("job=%s its deadline has passed", job.job_id)
                    self._cancel_sequence(job.sequence_id)
            case EmitStatus.FENCED:
                self._watch.fenced(job)
                self._lose(job, "its claim is void: another worker has it or it has ended")
            case EmitStatus.MISSING:
                self._lose(job, "its record is gone: it expired, or Redis lost its data")
            case EmitStatus.GAP:
                # Redis came back with an older state of this job. What it forgot is made again, token for token.
                log.warning("job=%s Redis forgot its last events; it is given back to be resumed", job.job_id)
                self._drop(job, Outcome.GIVEN_BACK)

    def _lose(self, job: RunningJob, why: str) -> None:
        if self._drop(job, Outcome.LOST):
            log.warning("job=%s dropped here: %s", job.job_id, why)

    def _drop(self, job: RunningJob, outcome: Outcome) -> bool:
        was_open = job.settle(outcome)
        if was_open:
            self._cancel_sequence(job.sequence_id)
        return was_open
