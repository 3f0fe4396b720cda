"""Answers that take long: they keep their connection alive while nothing comes, and notice when nobody waits any more.

Owns the first second, in which a job that cannot be still gets the status of its error; the filler after it; what a
client sees of an error that comes later; and what is done when the client leaves. Neighbours: the routes (which make
the pieces), `generation` (which is told of a client that left).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Receive, Scope, Send

from lamella_gateway.api_error import SERVER, ApiError
from lamella_gateway.settings import Settings

SSE_COMMENT = b": keep-alive\n\n"
SPACE = b" "
EVENT_STREAM = "text/event-stream"
JSON = "application/json"

log = logging.getLogger(__name__)
Pieces = AsyncGenerator[bytes, None]


class Waited(Protocol):
    """What an answer waits for."""

    async def abandon(self) -> None:
        """Note that nobody waits any more."""

    async def close(self) -> None:
        """Free what waiting took; harmless when repeated."""


@dataclass(frozen=True)
class Form:
    """How an answer looks on the wire while it grows, and what an error in its middle looks like."""

    media_type: str
    filler: bytes
    error: Callable[[ApiError], bytes]


def sse_error(error: ApiError) -> bytes:
    """Return an error as the last event of a stream."""
    return b"data: " + error.body() + b"\n\ndata: [DONE]\n\n"


CHUNKS = Form(EVENT_STREAM, SSE_COMMENT, sse_error)
WHOLE = Form(JSON, SPACE, lambda error: error.body())  # white space before JSON is part of JSON


class LiveResponse:
    """An ASGI response; `pieces` are its body, after `head`.

    Args:
        pieces: what comes, when it comes; it is closed at the end, however that comes.
        form: how it looks.
        waited: told when the client left before the end, and closed in any case.
        settings: the longest it may take, and how long it may be silent.
        head: sent at once with the status.
    """

    def __init__(
        self,
        pieces: Pieces,
        form: Form,
        waited: Waited,
        settings: Settings,
        head: bytes = b"",
    ) -> None:
        self._pieces = pieces
        self._form = form
        self._head = head
        self._waited = waited
        self._limit_s = settings.max_request_s
        self._silence_s = settings.keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        gone = asyncio.create_task(_disconnected(receive))
        sender = _Sender(self._form, send)
        try:
            async with asyncio.timeout(self._limit_s):
                is_heard = await self._send(gone, sender)
        except TimeoutError:
            await sender.fail(_too_long(self._limit_s))
            is_heard = False
        finally:
            gone.cancel()
            await self._pieces.aclose()
            await self._waited.close()
        if not is_heard:
            await self._waited.abandon()

    async def _send(self, gone: asyncio.Task[None], sender: _Sender) -> bool:
        """Send all of it; False where the client left."""
        step = asyncio.ensure_future(anext(self._pieces, None))
        try:
            while True:
                await asyncio.wait({step, gone}, timeout=self._silence_s, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return False
                if not step.done():
                    await sender.add(self._form.filler if sender.is_started else self._head)
                    continue
                piece = await step
                if piece is None:
                    await sender.end(b"")
                    return True
                step = asyncio.ensure_future(anext(self._pieces, None))
                if self._form is WHOLE:
                    await sender.end(piece)
                    return True
                await sender.add(piece if sender.is_started else self._head + piece)
        except ApiError as error:
            await sender.fail(error)
            return True
        finally:
            if not step.done():
                step.cancel()
                with contextlib.suppress(asyncio.CancelledError, ApiError):
                    await step
            elif not step.cancelled():
                step.exception()  # seen, so that asyncio does not complain of it


class _Sender:
    """What of the answer was sent."""

    def __init__(self, form: Form, send: Send) -> None:
        self._form = form
        self._send = send
        self.is_started = False

    async def add(self, piece: bytes) -> None:
        if not self.is_started:
            await self._start(200, {"content-type": self._form.media_type})
        if piece:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self, piece: bytes) -> None:
        if not self.is_started:
            size = {"content-length": str(len(piece))}
            await self._start(200, {"content-type": self._form.media_type, **size})
        await self._send({"type": "http.response.body", "body": piece, "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """Send an error: with its status if that is still open, else in the body."""
        if self.is_started:
            await self._send({"type": "http.response.body", "body": self._form.error(error), "more_body": False})
            return
        body = error.body()
        await self._start(error.status, {**error.headers(), "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.is_started = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        if self._form.media_type == EVENT_STREAM:
            raw += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_long(limit_s: float) -> ApiError:
    return ApiError(504, f"the answer took longer than {limit_s:g} s, so it was given up", type=SERVER, code="timeout")
