"""The engine process's side of the channel: its open engines, served to the worker.

Owns the threads that carry orders in and signs of life out. Events go out through `engine_outlet`, one an engine.
`engine_child` opens the engines and ends the process.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from lamella_engine.errors import EngineError, SequenceError
from lamella_engine.sequence_types import SequenceRequest
from lamella_worker.channel import Channel, ChannelBroken
from lamella_worker.engine_messages import (
    Answer,
    Broken,
    Cancel,
    Close,
    Order,
    Report,
    Submit,
    Taken,
    decode_order,
    encode,
    plain,
)
from lamella_worker.engine_outlet import BEAT_S, EngineOutlet
from lamella_worker.engine_port import ENGINE_ERROR, SweepEngine
from lamella_worker.failpoints import Failpoints
from lamella_worker.log_context import about_job, job_of
from lamella_worker.log_setup import WITHHELD

log = logging.getLogger(__name__)

_JOIN_S = 2.0


class EngineServer:
    """Serves engines over one channel.

    Args:
        engines: the open engines, by the names that the worker knows; closed by whoever opened them.
        channel: to the worker.
        failpoints: what is to go wrong.
        end: ends the process at once; called when an engine is broken, with what was told to the worker.
    """

    def __init__(
        self, engines: Mapping[str, SweepEngine], channel: Channel, failpoints: Failpoints, end: Callable[[str], None]
    ) -> None:
        self._channel = channel
        self._failpoints = failpoints
        self._end = end
        self._stop = threading.Event()
        self._outlets = {
            name: EngineOutlet(name, engine, self._report, self._stop, self._break) for name, engine in engines.items()
        }
        self._beats = threading.Thread(target=self._send_beats, name="engine-beat", daemon=True)

    def serve(self) -> None:
        """Carry orders and reports until the worker asks to close, or is gone."""
        for outlet in self._outlets.values():
            outlet.start()
        self._beats.start()
        places = sum(outlet.engine.facts.max_sequences for outlet in self._outlets.values())
        with ThreadPoolExecutor(places, thread_name_prefix="engine-submit") as pool:
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
        self._beats.join(_JOIN_S)
        for outlet in self._outlets.values():
            outlet.join(_JOIN_S)

    def _obey(self, order: Order, pool: ThreadPoolExecutor) -> None:
        match order:
            case Submit():
                pool.submit(self._submit, order, self._outlet(order.model).engine)
            case Cancel():
                try:
                    self._outlet(order.model).engine.cancel(order.sequence_id)
                except EngineError as error:
                    log.debug("job=%s is not cancelled: %s", job_of(order.sequence_id).job, error)
            case Taken():
                self._outlet(order.model).taken()
            case _:
                raise ChannelBroken(f"{order.kind} was ordered of engines that are open")

    def _outlet(self, model: str) -> EngineOutlet:
        outlet = self._outlets.get(model)
        if outlet is None:
            raise ChannelBroken(f"{plain(model)[:80]} is not served here")
        return outlet

    def _submit(self, order: Submit, engine: SweepEngine) -> None:
        model, call, request = order.model, order.call, order.request
        label = job_of(request.sequence_id)
        try:
            with about_job(label.job, label.attempt):
                self._failpoints.hit("submit", _prompt(request))
                engine.submit(request)
            answer = Answer(model, call)
        except SequenceError as error:
            answer = Answer(model, call, error.code, plain(str(error)))
        except Exception as error:
            # Whatever a prompt brings about in a tokenizer or template is this one sequence's failure. The words of
            # the exception may quote the prompt, so they are told to nobody.
            extra = WITHHELD | {"sequences": [request.sequence_id]}
            log.exception("job=%s cannot be taken; what went wrong may quote the prompt", label.job, extra=extra)
            answer = Answer(model, call, ENGINE_ERROR, f"{type(error).__name__}, see the log of the engine process")
        self._report(answer)

    def _send_beats(self) -> None:
        while not self._stop.wait(BEAT_S):
            for outlet in self._outlets.values():
                self._report(outlet.beat())

    def _report(self, report: Report) -> None:
        try:
            self._channel.send(encode(report))
        except ChannelBroken as error:
            if not self._stop.is_set():
                log.debug("a report is not sent: %s", error)  # `serve` sees the end of the channel as well

    def _break(self, why: str) -> None:
        if not self._stop.is_set():
            self._report(Broken(plain(why)))
            self._end(why)


def _prompt(request: SequenceRequest) -> str:
    if request.embedding is not None:
        return "\n".join(request.embedding.texts)
    if request.tool_chat is not None:
        return request.tool_chat.messages
    return request.prompt or "\n".join(content for _, content in request.messages or ())
