"""A TCP proxy in front of a server's unix socket, whose network can be cut, slowed down, held up or half lost."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

CHUNK_BYTES = 1 << 16
STOP_S = 10.0


class _Link:
    """One client's connection and the one to the server."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.ends = (near, far)
        self.is_stranded = False
        self.is_deaf = False  # the next answer is lost

    def abort(self) -> None:
        for end in self.ends:
            end.transport.abort()


class TcpProxy:
    """Passes bytes both ways on 127.0.0.1, unless told otherwise; every order holds from the next byte on.

    Attributes:
        url: how clients and workers reach the server through it.
        lost: connections that ended because an answer was to be lost.
    """

    def __init__(self, server: Path) -> None:
        self._server = server
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._delay_s = 0.0
        self._refuses = False
        self._sign: bytes | None = None
        self.lost = 0

    def __enter__(self) -> TcpProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(STOP_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(STOP_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_S)
        self._loop.close()

    @property
    def num_links(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    def cut(self) -> None:
        """End every connection, as a server that restarts or a switch that resets does."""
        self._do(lambda: [link.abort() for link in self._links])

    def refuse(self) -> None:
        """End every connection, and each new one at once."""
        self._refuses = True
        self.cut()

    def delay(self, seconds: float) -> None:
        """Pass everything on so much later."""
        self._delay_s = seconds

    def partition(self) -> None:
        """Pass nothing on, and take new connections without an answer; nobody is told. What is sent waits."""
        self._do(self._gate.clear)

    def strand(self) -> None:
        """Pass nothing on in the connections of now, for ever; new ones work. As after a router forgot them."""

        def mark() -> None:
            for link in self._links:
                link.is_stranded = True

        self._do(mark)

    def heal(self) -> None:
        """Work again: what waited is passed on, what was refused is let in."""
        self._refuses, self._delay_s = False, 0.0
        self._do(self._gate.set)

    def lose_next_answer_to(self, sign: bytes) -> None:
        """Let the server do the next command that has `sign` in it, and end the connection before its answer."""
        self._sign = sign

    def _do(self, order: Callable[[], object]) -> object:
        async def run() -> object:
            return order()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(STOP_S)

    async def _open(self) -> None:
        self._gate, self._gone = asyncio.Event(), asyncio.Event()
        self._gate.set()
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/0"

    async def _close(self) -> None:
        self._listener.close()
        for link in list(self._links):
            link.abort()
        self._gone.set()
        self._gate.set()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if others:
            await asyncio.wait(others, timeout=STOP_S / 2)

    async def _serve(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        if self._refuses:
            near_out.transport.abort()
            return
        try:
            far_in, far_out = await asyncio.open_unix_connection(self._server)
        except OSError:
            near_out.transport.abort()
            return
        link = _Link(near_out, far_out)
        self._links.add(link)
        try:
            await asyncio.gather(self._pump(link, near_in, far_out, True), self._pump(link, far_in, near_out, False))
        finally:
            self._links.discard(link)
            link.abort()

    async def _pump(
        self, link: _Link, source: asyncio.StreamReader, target: asyncio.StreamWriter, is_question: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(CHUNK_BYTES):
                await self._gate.wait()
                if self._delay_s:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._gone.wait(), self._delay_s)
                if link.is_stranded:
                    await self._gone.wait()
                if is_question and self._sign is not None and self._sign in chunk:
                    self._sign, link.is_deaf = None, True
                elif not is_question and link.is_deaf:
                    self.lost += 1
                    break
                target.write(chunk)
                await target.drain()
        link.abort()
