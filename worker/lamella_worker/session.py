"""The life of a job on this worker: claim, resume point, engine, last word or way back.

Owns the order of those steps and their deadlines, for as many jobs at once as there are task threads. `tasks` calls
`run` and only learns whether the message is done with; `publisher` settles jobs from the engine's events, `delivery`
from what the registry answers, `drain` through `begin_drain` and `give_up`, `process` through `paused`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import TypeVar

from lamella.embedding import EmbedRequest
from lamella.errors import DecodeError, EncryptionError
from lamella.job_seal import JobSeal
from lamella.messages import Failed, GenerateRequest, decode_request
from lamella.registry_calls import ClaimReply, ClaimStatus, claim_call, release_call
from lamella_engine.errors import EngineClosed, SequenceError
from lamella_worker.config import WorkerConfig
from lamella_worker.delivery import FIRST_RETRY_S, LONGEST_RETRY_S, Delivery, Emission
from lamella_worker.engine_port import ENGINE_ERROR, EngineAway, ServedEngines, SweepEngine
from lamella_worker.failpoints import pass_point
from lamella_worker.gate import Gate
from lamella_worker.job_table import JobTable
from lamella_worker.job_watch import NO_WATCH, Claimed, JobWatch
from lamella_worker.log_context import about_job
from lamella_worker.model_slots import ModelSlots
from lamella_worker.registry import Registry, RegistryAway, RegistryBroken, StreamLost
from lamella_worker.running_job import Outcome, RunningJob
from lamella_worker.sequence_request import sequence_request

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

PAUSE_LOOK_S = 0.1
LOOK_S = 1.0  # how often a waiting task looks whether the session still works
ENGINE_WAIT_S = 5.0  # for an engine that is started again, or a slot; then the message goes back, for other workers
UNLIMITED = 4096
ALONE_FROM = 2  # the attempt from which on a job runs alone
ALONE_FROM_LEFT = 3  # the same where it was a worker that was lost, and not an engine
PARKED_REMEMBERED = 1000


class Verdict(Enum):
    """What becomes of the Celery message."""

    ACK = "ack"
    REQUEUE = "requeue"


class Session:
    """Runs jobs on the worker's engines; `run` may be called from many threads at once.

    Args:
        engines: finds the open engine of a model.
        registry: the job registry.
        table: where running jobs are listed for the publisher, the lease keeper and the drain.
        config: the worker's settings.
        name: the worker's name, written into each claim.
        watch: is told what becomes of jobs.
        slots: how many jobs of a model run at once; None bounds nothing.
    """

    def __init__(
        self,
        engines: ServedEngines,
        registry: Registry,
        table: JobTable,
        config: WorkerConfig,
        name: str,
        watch: JobWatch = NO_WATCH,
        slots: ModelSlots | None = None,
    ) -> None:
        self._engines = engines
        self._registry = registry
        self._table = table
        self._config = config
        self._name = name
        self._watch = watch
        self._gate = Gate()
        self._slots = slots or ModelSlots(UNLIMITED)
        self._draining = threading.Event()
        self._paused = threading.Event()
        self._gave_up = threading.Event()
        self._parked: dict[str, None] = {}
        self.delivery = Delivery(registry, config.worker.lease_s, self._cancel_sequence, self._gave_up, watch)

    @property
    def is_draining(self) -> bool:
        """True once no new job is taken."""
        return self._draining.is_set()

    def run(self, job_id: str, trace: str | None = None, model: str | None = None) -> Verdict:
        """Take a job as far as it goes here; returns what becomes of its message, and never raises.

        `trace` is the W3C traceparent that came with the message, `model` the one whose queue it came from; None means
        the first that the worker started with.
        """
        model = model or self._config.worker.served[0]
        with about_job(job_id), self._slots.place(model, ENGINE_WAIT_S, self._draining.is_set) as has_slot:
            if not has_slot:
                return Verdict.REQUEUE
            # A job is released, and so may come back at once, while its id is held no more but it is still listed.
            with ExitStack() as listing:
                ride = self._ride(job_id, model, trace, listing)
                return ride if isinstance(ride, Verdict) else self._finish(*ride)

    def _ride(
        self, job_id: str, model: str, trace: str | None, listing: ExitStack
    ) -> tuple[RunningJob, Outcome] | Verdict:
        """Run the job if it is ours to run; returns it with its outcome, or else what becomes of the message."""
        with self._table.hold(job_id) as is_ours:
            if not is_ours:
                log.info("job=%s a second message for a job that runs here is dropped", job_id)
                return Verdict.ACK
            if not self._has_engine(model):
                return Verdict.REQUEUE
            try:
                claim = self._claim(job_id)
            except RegistryBroken:
                log.exception("job=%s cannot be claimed; its record is left as it is", job_id)
                return Verdict.ACK
            if claim is None:
                return Verdict.REQUEUE
            if claim.status is not ClaimStatus.OK:
                self._report_unclaimed(job_id, model, claim.status)
                return Verdict.ACK
            pass_point("claimed")
            job = RunningJob(job_id, claim.fence, claim.seq + 1, claim.attempts, JobSeal(self._registry.ring), model)
            listing.enter_context(self._table.listed(job))
            listing.enter_context(about_job(job_id, claim.attempts))
            self._watch.claimed(job, self._claimed(job_id, claim, trace))
            outcome = self._run_claimed(job, claim)
            job.settle(outcome)
            return job, outcome

    def begin_drain(self) -> None:
        """Take no more jobs, and give the running ones back at the next sweep boundary."""
        self._draining.set()
        for job in self._table.jobs():
            self._cancel_sequence(job.sequence_id)

    @contextmanager
    def paused(self, timeout_s: float) -> Iterator[bool]:
        """Take no jobs in the block; before it the running ones are given back at the next sweep boundary.

        What does not reach one in half of `timeout_s` seconds is given back as it stands; yields False if jobs are
        still not released after all of them, because Redis does not answer.
        """
        self._paused.set()
        try:
            for job in self._table.jobs():
                self._cancel_sequence(job.sequence_id)
            if not self.wait_idle(timeout_s / 2):
                log.warning("the sweep or Redis takes too long; jobs are released as they stand")
                for job in self._table.jobs():
                    job.settle(Outcome.GIVEN_BACK)
            yield self.wait_idle(timeout_s / 2)
        finally:
            self._paused.clear()

    def give_up(self) -> None:
        """Wait no longer for the engine or for Redis: every running job is given back as it stands."""
        self._draining.set()
        self._gave_up.set()
        for job in self._table.jobs():
            job.settle(Outcome.GIVEN_BACK)

    def _has_engine(self, model: str) -> bool:
        """Wait a while for an engine that is being opened; a job that is not claimed is free for other workers."""
        deadline = time.monotonic() + ENGINE_WAIT_S
        while not self._draining.is_set():
            is_open = not self._paused.is_set() and self._engines.wait_ready(LOOK_S)
            if is_open and self._engines.find(model) is not None:
                return True
            if time.monotonic() >= deadline:
                return False
            self._draining.wait(PAUSE_LOOK_S)
        return False

    def _claim(self, job_id: str) -> ClaimReply | None:
        """Claim the job, waiting while Redis is away; None once the worker drains."""
        call = claim_call(
            self._registry.keys,
            job_id,
            self._name,
            int(self._config.worker.lease_s * 1000),
            self._config.worker.max_attempts,
        )
        has_lost_an_answer = False
        delay_s = FIRST_RETRY_S
        while not self._draining.is_set():
            try:
                reply = self._registry.call(call)
                if reply.status is ClaimStatus.HELD and has_lost_an_answer:
                    # The holder may be ourselves: the claim stood, and only its answer was lost.
                    return self._registry.recover_claim(job_id, self._name) or reply
                return reply
            except RegistryAway as error:
                if not has_lost_an_answer:
                    log.warning("job=%s waits to be claimed: %s", job_id, error)
                has_lost_an_answer = True
            self._draining.wait(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)
        return None

    def _claimed(self, job_id: str, claim: ClaimReply, trace: str | None) -> Claimed:
        """What watchers are told; that Redis is away is found out soon enough."""
        times = None
        if self._watch.needs_times:
            with contextlib.suppress(RegistryAway, RegistryBroken):
                times = self._registry.waiting_since(job_id)
        accepted_at, now = times or (None, None)
        waited_s = None if accepted_at is None or now is None else max(0.0, now - accepted_at)
        return Claimed(accepted_at, waited_s, claim.seq, trace)

    def _report_unclaimed(self, job_id: str, model: str, status: ClaimStatus) -> None:
        match status:
            case ClaimStatus.UNKNOWN_SCHEMA:
                if self._is_new(job_id):
                    log.error("job=%s is of a newer schema and is left for a newer worker; upgrade this one", job_id)
            case ClaimStatus.POISON:
                self._watch.dead(job_id, model)
                log.error("job=%s is failed: all its %d attempts were lost", job_id, self._config.worker.max_attempts)
            case _:
                log.info("job=%s not run here: %s", job_id, status.value)

    def _is_new(self, job_id: str) -> bool:
        """Remember a job that is left to others; True the first time."""
        if job_id in self._parked:
            return False
        if len(self._parked) >= PARKED_REMEMBERED:
            self._parked.pop(next(iter(self._parked)))
        self._parked[job_id] = None
        return True

    def _run_claimed(self, job: RunningJob, claim: ClaimReply) -> Outcome:
        try:
            request = decode_request(job.seal.open_request(claim.request_json))
            engine = self._engines.find(request.model)
            if engine is None:
                return self._not_served(job, request.model)
            opened = job.seal.open_event
            generated_ids = self._patiently(lambda: self._registry.stored_token_ids(job.job_id, claim.seq, opened))
            if generated_ids is None:
                return Outcome.GIVEN_BACK
            return self._run_sequence(job, engine, request, generated_ids, is_alone=self._runs_alone(claim))
        except EncryptionError as error:
            if self._is_new(job.job_id):
                log.error("job=%s is left for a worker that can open it: %s", job.job_id, error)
            return Outcome.SET_ASIDE
        except DecodeError as error:
            return self._fail(job, "bad_request", f"this worker cannot read the request: {error}")
        except StreamLost as error:
            return self._fail(job, "stream_lost", f"the job cannot go on: {error}; submit it again")
        except SequenceError as error:
            return self._refused(job, error)
        except (EngineClosed, EngineAway):
            return Outcome.GIVEN_BACK
        except Exception:
            log.exception("job=%s attempt %d failed in the worker", job.job_id, job.attempts)
            return Outcome.ATTEMPT_FAILED

    def _not_served(self, job: RunningJob, asked_for: str) -> Outcome:
        if asked_for == job.model:
            return Outcome.GIVEN_BACK  # it was served when the message came
        return self._fail(job, "wrong_model", _wrong_model(asked_for, job.model))

    def _runs_alone(self, claim: ClaimReply) -> bool:
        """A job that may have killed an engine shares one with nobody.

        Where engines have processes of their own, a job kills its engine and not its worker. So a worker that was
        lost says little about its jobs: they go on together, without waiting for those that run here already.
        """
        limits = self._config.worker
        alone_from = ALONE_FROM_LEFT if claim.was_left and limits.isolation == "child" else ALONE_FROM
        return claim.attempts >= min(alone_from, max(ALONE_FROM, limits.max_attempts))

    def _run_sequence(
        self,
        job: RunningJob,
        engine: SweepEngine,
        request: GenerateRequest | EmbedRequest,
        generated_ids: tuple[int, ...],
        *,
        is_alone: bool,
    ) -> Outcome:
        def is_called_off() -> bool:
            is_stopped = self._draining.is_set() or self._paused.is_set()
            return is_stopped or job.is_settled or job.is_cancel_requested

        with self._gate.pass_through(is_alone=is_alone, is_called_off=is_called_off) as has_entered:
            if has_entered and not is_called_off():
                log.info(
                    "job=%s starts: attempt %d, after %d tokens%s",
                    job.job_id,
                    job.attempts,
                    len(generated_ids),
                    ", alone" if is_alone else "",
                )
                job.engine = engine
                engine.submit(sequence_request(job.sequence_id, request, generated_ids))
                if is_called_off():  # asked for while the engine did not know the sequence yet
                    engine.cancel(job.sequence_id)
                return self._await(job)
        if job.is_cancel_requested and not job.is_settled:
            self.delivery.deliver([Emission(job, (job.last_word,), Outcome.ENDED)])
        job.settle(Outcome.GIVEN_BACK)
        return self._await(job)

    def _await(self, job: RunningJob) -> Outcome:
        while True:
            outcome = job.wait(LOOK_S)
            if outcome is not None:
                return outcome
            if self._gave_up.is_set():
                job.settle(Outcome.GIVEN_BACK)

    def _refused(self, job: RunningJob, error: SequenceError) -> Outcome:
        if error.code == ENGINE_ERROR:
            log.error("job=%s attempt %d failed in the engine: %s", job.job_id, job.attempts, error)
            return Outcome.ATTEMPT_FAILED
        if error.code == "busy":
            return Outcome.GIVEN_BACK
        return self._fail(job, error.code, str(error))

    def _fail(self, job: RunningJob, code: str, message: str) -> Outcome:
        log.info("job=%s failed: %s", job.job_id, code)
        self.delivery.deliver([Emission(job, (Failed(code=code, message=message),), Outcome.ENDED)])
        return self._await(job)

    def _finish(self, job: RunningJob, outcome: Outcome) -> Verdict:
        """Do what the outcome asks for, and say what becomes of the message."""
        job.settle(outcome)
        self._watch.left(job, outcome)
        log.info("job=%s %s", job.job_id, outcome.value)
        if outcome in (Outcome.ENDED, Outcome.LOST):
            return Verdict.ACK
        gives_back_attempt = outcome in (Outcome.GIVEN_BACK, Outcome.SET_ASIDE)
        is_aside = outcome is Outcome.SET_ASIDE
        call = release_call(self._registry.keys, job.job_id, job.fence, gives_back_attempt, is_aside)
        try:
            status = self._patiently(lambda: self._registry.call(call))
        except RegistryBroken:
            log.exception("job=%s cannot be released; its lease runs out instead", job.job_id)
            return Verdict.REQUEUE
        # Released, the job waits in its line and gets another message (set aside, after a while). Unanswered, this
        # message is the way back.
        return Verdict.REQUEUE if status is None else Verdict.ACK

    def _patiently(self, ask: Callable[[], Answer]) -> Answer | None:
        """Ask the registry until it answers; None once the session gave up waiting."""
        delay_s = FIRST_RETRY_S
        while True:
            try:
                return ask()
            except RegistryAway as error:
                log.debug("Redis is away: %s", error)
            if self._gave_up.wait(delay_s):
                return None
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no job is listed any more; False if some still are after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while self._table.jobs():
            if time.monotonic() >= deadline:
                return False
            pause.wait(0.05)
        return True

    def _cancel_sequence(self, sequence_id: str) -> None:
        job = self._table.find(sequence_id)
        if job is None or job.engine is None:
            return  # no engine knows it
        try:
            job.engine.cancel(sequence_id)
        except EngineClosed:
            log.debug("the engine closed before sequence %s was cancelled", sequence_id)


def _wrong_model(asked_for: str, queue_of: str) -> str:
    return (
        f"the job asks for {asked_for}, but its message came from the queue of {queue_of} to a worker that does not "
        "serve it; submit it again, and check that nothing moves messages between queues"
    )
