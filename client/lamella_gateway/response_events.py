"""A response's stream: from the stored events of its job to numbered events of OpenAI's kind, always the same ones.

The numbers are a function of the job's stored events and the response's record alone, so whoever comes later, to any
gateway, gets the same events under the same numbers and can go on after any of them. Does no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from lamella import Cancelled, Done, Failed, Progress, TokenEvent
from lamella_gateway.answer import Added, Answer, CallItem, Item, TextItem
from lamella_gateway.logprobs import chat_logprobs
from lamella_gateway.response_record import ResponseRecord
from lamella_gateway.response_shapes import (
    ItemStatus,
    ended_body,
    item_body,
    item_id,
    output_items,
    response_body,
    text_body,
)


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
        self._answer = Answer(response_id.removeprefix("resp_"), one_call=not record.parallel_tool_calls)
        self._after = after
        self._number = 0
        self._items: list[Item] = []  # those told of; the last one is open
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
            case TokenEvent():
                added = self._answer.add(event)
                head = self._progress()
                if not self._items and not self._answer.may_call:
                    head += self._open(TextItem())
                return head + self._added(added)
            case Done() | Failed() | Cancelled():
                return self._end(event, ended_at)

    def _end(self, event: Done | Failed | Cancelled, ended_at: float | None) -> bytes:
        head = self._progress() + self._added(self._answer.add(event))
        if isinstance(event, Done):
            items = output_items(self._answer, True)
            head += b"" if self._items else self._open(items[0])
            head += self._close("completed" if event.finish_reason == "stop" else "incomplete")
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

    def _added(self, added: Added) -> bytes:
        """Return the events for what came, in order."""
        pieces = [self._arguments(call.arguments) for call in added.more]
        if added.text or added.logprobs:
            if not self._items or isinstance(self._items[-1], CallItem):
                pieces.append(self._open(TextItem()))
            told = chat_logprobs(added.logprobs)
            pieces.append(self._text("response.output_text.delta", {"delta": added.text, "logprobs": told}))
        for call in added.calls:
            pieces.append(self._open(CallItem(call.id or "", call.name or "")))
            pieces.append(self._arguments(call.arguments))
        return b"".join(pieces)

    def _open(self, item: Item) -> bytes:
        """Return the events of a new item, and of the end of the one before it."""
        before = self._close("completed") if self._items else b""
        self._items.append(item)
        index = len(self._items) - 1
        body = item_body(self._base["id"], index, item, "in_progress")
        if body["type"] == "message":
            body["content"] = []
        added = before + self._event("response.output_item.added", {"output_index": index, "item": body})
        if isinstance(item, CallItem):
            return added
        return added + self._text("response.content_part.added", {"part": text_body(item)})

    def _close(self, status: ItemStatus) -> bytes:
        """Return the events of the end of the open item."""
        index = len(self._items) - 1
        item = self._answer.items[index] if self._answer.items else self._items[index]
        body = item_body(self._base["id"], index, item, status)
        if isinstance(item, CallItem):
            told = {"name": item.name, "arguments": item.arguments}
            last = self._of_item("response.function_call_arguments.done", told)
        else:
            part = text_body(item)
            last = self._text("response.output_text.done", {"text": part["text"], "logprobs": part["logprobs"]})
            last += self._text("response.content_part.done", {"part": part})
        return last + self._event("response.output_item.done", {"output_index": index, "item": body})

    def _arguments(self, text: str) -> bytes:
        return self._of_item("response.function_call_arguments.delta", {"delta": text}) if text else b""

    def _whole(self, kind: str) -> bytes:
        return self._event(kind, {"response": self._base})

    def _text(self, kind: str, fields: Mapping[str, object]) -> bytes:
        return self._of_item(kind, {"content_index": 0, **fields})

    def _of_item(self, kind: str, fields: Mapping[str, object]) -> bytes:
        index = len(self._items) - 1
        item = item_id(self._base["id"], index, self._items[index])
        return self._event(kind, {"item_id": item, "output_index": index, **fields})

    def _event(self, kind: str, fields: Mapping[str, object]) -> bytes:
        number = self._number
        self._number += 1
        if number <= self._after:
            return b""
        body = json.dumps({"type": kind, "sequence_number": number, **fields})
        return f"event: {kind}\ndata: {body}\n\n".encode()
