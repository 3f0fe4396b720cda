"""A response's stream: from the stored events of its job to numbered events of OpenAI's kind, always the same ones.

The numbers are a function of the job's stored events and the response's record alone, so whoever comes later, to any
gateway, gets the same events under the same numbers and can go on after any of them. Does no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from lamella import Cancelled, Done, Failed, Progress, TokenEvent
from lamella_gateway.answer import Answer
from lamella_gateway.logprobs import chat_logprobs
from lamella_gateway.response_record import ResponseRecord
from lamella_gateway.response_shapes import ended_body, message_body, response_body, text_body


class ResponseEvents:
    """Turns one job's events into a response's; fed by its one reader.

    Args:
        response_id: the response.
        record: what was asked.
        created_at: when (Unix seconds).
        after: events up to this number are left out, -1 leaves out none.
    """

    def __init__(self, response_id: str, record: ResponseRecord, created_at: float, after: int = -1) -> None:
        self._record = record
        self._base = response_body(response_id, record, created_at, "queued" if record.background else "in_progress")
        self._item_id = response_id.replace("resp_", "msg_", 1)
        self._answer = Answer()
        self._after = after
        self._number = 0
        self._has_item = False
        self._is_in_progress = False

    def begin(self) -> bytes:
        """Return the events that stand before anything has come."""
        first = self._whole("response.created")
        if self._record.background:
            return first + self._whole("response.queued")
        return first + self._progress()

    def add(self, event: TokenEvent | Done | Failed | Cancelled | Progress, ended_at: float | None) -> bytes:
        """Return the events that a job's event brings."""
        match event:
            case Progress():
                return b""
            case TokenEvent(text=text, logprobs=logprobs):
                self._answer.add(event)
                head = self._progress() + self._item()
                if not text and not logprobs:
                    return head
                told = chat_logprobs(logprobs or ())
                return head + self._text("response.output_text.delta", {"delta": text, "logprobs": told})
            case Done() | Failed() | Cancelled():
                return self._end(event, ended_at)

    def _end(self, event: Done | Failed | Cancelled, ended_at: float | None) -> bytes:
        head = self._progress()
        if isinstance(event, Done):
            self._answer.add(event)
            head += self._item() + self._item_end(event.finish_reason == "stop")
        self._base = ended_body(self._base, self._answer, event, ended_at)
        # OpenAI has no event for a cancelled response: it is incomplete, and its status says cancelled.
        names = {"completed": "completed", "failed": "failed"}
        return head + self._event(f"response.{names.get(self._base['status'], 'incomplete')}", {"response": self._base})

    def _progress(self) -> bytes:
        if self._is_in_progress:
            return b""
        self._is_in_progress = True
        self._base["status"] = "in_progress"
        return self._whole("response.in_progress")

    def _item(self) -> bytes:
        if self._has_item:
            return b""
        self._has_item = True
        item = {**message_body(self._base["id"], Answer(), "in_progress"), "content": []}
        part = text_body(Answer())
        return self._event("response.output_item.added", {"output_index": 0, "item": item}) + self._text(
            "response.content_part.added", {"part": part}
        )

    def _item_end(self, is_complete: bool) -> bytes:
        part = text_body(self._answer)
        item = message_body(self._base["id"], self._answer, "completed" if is_complete else "incomplete")
        return (
            self._text("response.output_text.done", {"text": part["text"], "logprobs": part["logprobs"]})
            + self._text("response.content_part.done", {"part": part})
            + self._event("response.output_item.done", {"output_index": 0, "item": item})
        )

    def _whole(self, kind: str) -> bytes:
        return self._event(kind, {"response": self._base})

    def _text(self, kind: str, fields: Mapping[str, object]) -> bytes:
        return self._event(kind, {"item_id": self._item_id, "output_index": 0, "content_index": 0, **fields})

    def _event(self, kind: str, fields: Mapping[str, object]) -> bytes:
        number = self._number
        self._number += 1
        if number <= self._after:
            return b""
        body = json.dumps({"type": kind, "sequence_number": number, **fields})
        return f"event: {kind}\ndata: {body}\n\n".encode()
