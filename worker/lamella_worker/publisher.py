"""Turns what each sweep produced into stream events, for all jobs in one round trip.

Owns the one thread that takes the engine's events, and the translation from engine types to wire types. While Redis
is away it blocks in `delivery`, so the engine stalls after its small bound of undelivered sweeps and nothing is lost.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lamella.embedding import EmbeddingsEvent
from lamella.messages import Cancelled, Done, Failed, Progress, TokenEvent, TokenLogprob, Usage
from lamella_engine.errors import EngineError
from lamella_engine.sequence_types import (
    FinishReason,
    SequenceEmbeddings,
    SequenceEvent,
    SequenceFinished,
    SequencePrefill,
    SequenceTokens,
    SweepEvents,
)
from lamella_worker.delivery import Delivery, Emission
from lamella_worker.engine_port import ENGINE_ERROR, SweepEngine
from lamella_worker.job_table import JobTable
from lamella_worker.job_watch import NO_WATCH, JobWatch
from lamella_worker.running_job import Outcome, RunningJob

log = logging.getLogger(__name__)

POLL_S = 0.5


class Publisher:
    """The thread between the engine's sweeps and the registry.

    Args:
        engine: whose events are taken.
        table: where a sequence's job is found; events of sequences that are not listed are dropped.
        delivery: where they go.
        on_end: called once, from the thread, with True if it ended through an error, False where its engine closed.
        watch: is told of sweeps.
        model: the engine's.
    """

    def __init__(
        self,
        engine: SweepEngine,
        table: JobTable,
        delivery: Delivery,
        on_end: Callable[[bool], None],
        watch: JobWatch = NO_WATCH,
        model: str = "",
    ) -> None:
        self._model = model
        self._engine = engine
        self._table = table
        self._delivery = delivery
        self._on_end = on_end
        self._watch = watch
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        """Start taking events."""
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread, which ends when the engine is closed; False if it still runs."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        has_failed = True
        try:
            for batch in self._engine.events(poll_s=POLL_S):
                if batch.events:
                    self.publish(batch)
            has_failed = False
        except EngineError as error:
            log.error("the engine failed for good; this worker stops and its jobs go on elsewhere: %s", error)
        except Exception:
            log.exception("the publisher failed; this worker stops and its jobs go on elsewhere")
        finally:
            self._on_end(has_failed)

    def publish(self, batch: SweepEvents) -> None:
        """Deliver one sweep's events; returns when they are stored or their jobs are settled otherwise."""
        emissions: dict[str, Emission] = {}
        for event in batch.events:
            job = self._table.find(event.sequence_id)
            if job is None or job.is_settled:
                continue  # a sequence whose job was lost or given back; the engine drops it at the boundary
            earlier = emissions.get(event.sequence_id, Emission(job))
            emissions[event.sequence_id] = _extend(earlier, event)
        self._watch.swept(self._model, batch.sweep_seconds, len(emissions))
        if emissions:
            self._delivery.deliver(list(emissions.values()))


def _extend(emission: Emission, event: SequenceEvent) -> Emission:
    job = emission.job
    match event:
        case SequenceTokens():
            return Emission(job, (*emission.events, _token_event(event)), emission.outcome, emission.progress)
        case SequenceEmbeddings(count=count, width=width, values=values):
            vectors = EmbeddingsEvent(count=count, width=width, values=values)
            return Emission(job, (*emission.events, vectors), emission.outcome, emission.progress)
        case SequencePrefill():
            progress = Progress(prefilled_tokens=event.prefilled_tokens, prompt_tokens=event.prompt_tokens)
            return Emission(job, emission.events, emission.outcome, progress)
        case SequenceFinished():
            last_word, outcome = _ending(job, event)
            return Emission(job, (*emission.events, *last_word), outcome, emission.progress)


def _ending(job: RunningJob, event: SequenceFinished) -> tuple[tuple[Done | Failed | Cancelled, ...], Outcome]:
    match event.reason:
        case FinishReason.STOP | FinishReason.LENGTH:
            usage = Usage(
                prompt_tokens=event.prompt_tokens,
                completion_tokens=event.completion_tokens,
                sweeps=event.sweeps,
                streamed_bytes=event.streamed_bytes,
                run_s=event.run_s,
            )
            reason = "stop" if event.reason is FinishReason.STOP else "length"
            return (Done(finish_reason=reason, usage=usage),), Outcome.ENDED
        case FinishReason.CANCELLED:
            # A drain cancels too, but then the job is to go on elsewhere.
            return ((job.last_word,), Outcome.ENDED) if job.is_cancel_requested else ((), Outcome.GIVEN_BACK)
        case FinishReason.ERROR:
            code, message = event.error_code or ENGINE_ERROR, event.error or "the engine gave no reason"
            if code != ENGINE_ERROR:
                return (Failed(code=code, message=message),), Outcome.ENDED
            log.error("job=%s attempt %d failed in the engine: %s", job.job_id, job.attempts, message)
            return (), Outcome.ATTEMPT_FAILED


def _token_event(event: SequenceTokens) -> TokenEvent:
    logprobs = None
    if event.logprobs is not None:
        logprobs = tuple(TokenLogprob(**vars(position)) for position in event.logprobs)
    tool_format = None if event.tool_format is None else event.tool_format.value
    return TokenEvent(token_ids=event.token_ids, text=event.text, logprobs=logprobs, tool_format=tool_format)
