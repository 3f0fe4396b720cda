"""A worker without an engine that answers every job from a thread: the prompt in angle brackets, as one token."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection
from types import TracebackType

from redis.exceptions import RedisError

from lamella.messages import GenerateRequest, decode_request
from lamella.registry_calls import ClaimStatus
from tests.client.acting_worker import ActingWorker, done, failed, token

PAUSE_S = 0.01


class AnsweringWorker:
    """Claims jobs as they are sent and ends them; jobs it `holds` stay running, those it `refuses` fail.

    Attributes:
        latest_first: of the jobs at hand the newest is answered first.
        most_at_once: the most jobs that it ever had at hand.
        asked: what it was asked, in the order of the claims.
    """

    def __init__(
        self,
        worker: ActingWorker,
        *,
        refuses: Collection[str] = (),
        holds: Collection[str] = (),
        patient: bool = False,
        answer: Callable[[str], str] = "<{}>".format,
    ) -> None:
        self.latest_first = False
        self.most_at_once = 0
        self.asked: list[str] = []
        self._worker = worker
        self._refuses, self._holds = refuses, holds
        self._patient = patient
        self._answer = answer
        self._stop = threading.Event()
        self._at_hand: list[tuple[str, str]] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="answering", daemon=True)

    def __enter__(self) -> AnsweringWorker:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(40.0)
        if self._failure is None:
            return
        if error is None:
            raise self._failure
        error.add_note(f"the answering worker had given up before: {self._failure!r}")

    def announce(self) -> None:
        """Be listed as a live worker."""
        self._worker.announce()

    def _run(self) -> None:
        while not self._stop.wait(PAUSE_S):
            try:
                self._round()
            except RedisError as error:
                if not self._patient:
                    self._failure = error
                    return

    def _round(self) -> None:
        self._worker.redis.set(self._worker.keys.capacity(self._worker.model), 4, ex=600)
        while raw := self._worker.redis.rpop(self._worker.keys.queue_list(self._worker.model)):
            self._claim(str(json.loads(str(raw))["headers"]["id"]))
        self.most_at_once = max(self.most_at_once, int(self._worker.redis.zcard(self._worker.keys.active)))
        if self._at_hand:
            job_id, text = self._at_hand.pop(-1 if self.latest_first else 0)
            if text in self._refuses:
                self._worker.emit(job_id, failed())
            else:
                self._worker.emit(job_id, token(self._answer(text)), done())

    def _claim(self, job_id: str) -> None:
        reply = self._worker.claim(job_id)
        if reply.status is not ClaimStatus.OK:
            return
        text = said(decode_request(reply.request_json))
        self.asked.append(text)
        if text not in self._holds:
            self._at_hand.append((job_id, text))


def said(request: GenerateRequest) -> str:
    """Return the prompt, or what was said last."""
    return request.prompt if request.prompt is not None else str((request.messages or ())[-1].content)
