"""The engine process's side of the channel: an open engine, served to the worker.

Owns the threads that carry orders in and reports out, and the rule by which an engine counts as broken. A sweep's
events are sent only while the worker has room for them; else the engine's own outbox fills and its sweeps stall, as
they do in one process. `engine_child` opens the engine and ends the process.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lamella_engine.errors import EngineError, SequenceError
from lamella_engine.sequence_types import SequenceFinished, SequenceRequest, SequenceTokens, SweepEvents
from lamella_worker.channel import Channel, ChannelBroken
from lamella_worker.engine_messages import (
    Answer,
    Beat,
    Broken,
    Cancel,
    Close,
    Order,
    Report,
    Submit,
    Sweep,
    Taken,
    decode_order,
    encode,
    plain,
)
from lamella_worker.engine_port import CREDIT, ENGINE_ERROR, SweepEngine
from lamella_worker.failpoints import Failpoints
from lamella_worker.log_context import about_job, job_of
from lamella_worker.log_setup import WITHHELD

log = logging.getLogger(__name__)

BEAT_S = 0.25
POLL_S = 0.5
FAILED_SWEEPS = 3  # in a row; then the engine is opened anew
_JOIN_S = 2.0
_DEVICE_WORDS = ("CUDA error", "HIP error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "cudaError", "device-side assert")
_PASSING_WORDS = ("out of memory", "ALLOC_FAILED")  # of the device too, but they leave it usable


class EngineServer:
    """Serves one engine over one channel.

    Args:
        engine: the open engine; closed by whoever opened it.
        channel: to the worker.
        failpoints: what is to go wrong.
        end: ends the process at once; called when the engine is broken, with what was told to the worker.
    """

    def __init__(
        self, engine: SweepEngine, channel: Channel, failpoints: Failpoints, end: Callable[[str], None]
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._failpoints = failpoints
        self._end = end
        self._credit = threading.Semaphore(CREDIT)
        self._is_stalled = False
        self._stop = threading.Event()
        self._failed_sweeps = 0
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("engine-events", self._send_events), ("engine-beat", self._send_beats))
        ]

    def serve(self) -> None:
        """Carry orders and reports until the worker asks to close, or is gone."""
        for thread in self._threads:
            thread.start()
        with ThreadPoolExecutor(self._engine.facts.max_sequences, thread_name_prefix="engine-submit") as pool:
            try:
                while (frame := self._channel.receive()) is not None:
                    order = decode_order(frame)
                    if isinstance(order, Close):
                        break
                    self._obey(order, pool)
            except ChannelBroken:
                log.exception("the worker cannot be understood; the engine process ends")
            finally:
                self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _obey(self, order: Order, pool: ThreadPoolExecutor) -> None:
        match order:
            case Submit():
                pool.submit(self._submit, order.call, order.request)
            case Cancel():
                try:
                    self._engine.cancel(order.sequence_id)
                except EngineError as error:
                    log.debug("job=%s is not cancelled: %s", job_of(order.sequence_id).job, error)
            case Taken():
                self._credit.release()
            case _:
                raise ChannelBroken(f"{order.kind} was ordered of an engine that is open")

    def _submit(self, call: int, request: SequenceRequest) -> None:
        label = job_of(request.sequence_id)
        try:
            with about_job(label.job, label.attempt):
                self._failpoints.hit("submit", _prompt(request))
                self._engine.submit(request)
            answer = Answer(call)
        except SequenceError as error:
            answer = Answer(call, error.code, plain(str(error)))
        except Exception as error:
            # Whatever a prompt brings about in a tokenizer or template is this one sequence's failure. The words of
            # the exception may quote the prompt, so they are told to nobody.
            extra = WITHHELD | {"sequences": [request.sequence_id]}
            log.exception("job=%s cannot be taken; what went wrong may quote the prompt", label.job, extra=extra)
            answer = Answer(call, ENGINE_ERROR, f"{type(error).__name__}, see the log of the engine process")
        self._report(answer)

    def _send_events(self) -> None:
        try:
            for batch in self._engine.events(poll_s=POLL_S):
                if self._stop.is_set():
                    return
                if batch.events and self._wait_for_room():
                    self._report(Sweep(batch.events, self._engine.counters(), batch.sweep_seconds))
                    self._judge(batch)
        except EngineError as error:
            self._break(str(error))
        except Exception as error:
            log.exception("the engine's events cannot be sent")
            self._break(f"{type(error).__name__}: {error}")

    def _wait_for_room(self) -> bool:
        while not self._credit.acquire(timeout=BEAT_S):
            self._is_stalled = True
            if self._stop.is_set():
                return False
        self._is_stalled = False
        return True

    def _send_beats(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._report(Beat(self._engine.counters(), self._is_stalled))

    def _report(self, report: Report) -> None:
        try:
            self._channel.send(encode(report))
        except ChannelBroken as error:
            if not self._stop.is_set():
                log.debug("a report is not sent: %s", error)  # `serve` sees the end of the channel as well

    def _judge(self, batch: SweepEvents) -> None:
        """End the process where its device, or every sweep, fails: what is opened anew may work."""
        failed = [
            event.error or ""
            for event in batch.events
            if isinstance(event, SequenceFinished) and event.error_code == ENGINE_ERROR
        ]
        if not failed:
            if any(isinstance(event, SequenceTokens) for event in batch.events):
                self._failed_sweeps = 0
            return
        self._failed_sweeps += 1
        is_lost = any(word in failed[0] for word in _DEVICE_WORDS) and not any(w in failed[0] for w in _PASSING_WORDS)
        if is_lost:
            self._break(f"the device failed and is lost to this process: {failed[0]}")
        elif self._failed_sweeps >= FAILED_SWEEPS:
            self._break(f"{self._failed_sweeps} sweeps in a row failed, the last one so: {failed[0]}")

    def _break(self, why: str) -> None:
        if not self._stop.is_set():
            self._report(Broken(plain(why)))
            self._end(why)


def _prompt(request: SequenceRequest) -> str:
    return request.prompt or "\n".join(content for _, content in request.messages or ())
