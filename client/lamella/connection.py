"""The connections to the server, synchronous and asyncio: they drive operations and open what the stream readers need.

Owns pools, timeouts, retries and the edge at which redis-py's errors become ours. An operation has one deadline for
all its steps; a step whose answer did not come is sent again while the deadline allows (every step may be repeated).
Neighbours: `steps` (what is driven), `server_errors` (wording), `stream` and `async_stream` (readers).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, NoScriptError, RedisError
from redis.retry import Retry

from lamella.async_channels import AsyncChannels
from lamella.command_packer import CommandPacker
from lamella.errors import LamellaError, RequestError
from lamella.keep_time import resolve_keep_s
from lamella.key_ring import KEYS_VARIABLE, KeyRing, load_key_ring
from lamella.keys import Keys
from lamella.script_call import ScriptCall, ScriptName, script_source
from lamella.server_errors import is_passing, translated
from lamella.server_url import resolve_url
from lamella.steps import Operation, Result, Step

READER_SOCKET_TIMEOUT_S = 2.0
MAX_CONNECTIONS = 1000
STORED_READS = 16
RETRY_PAUSE_S = 0.1
HEALTH_CHECK_S = 15


def check_seconds(name: str, value: object) -> float:
    """Return `value` if it is a usable time span.

    Raises:
        RequestError: it is not a positive, finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise RequestError(f"{name} is {value!r}; use a number of seconds above 0 (every wait has an end)")
    return float(value)


@cache
def script_digest(name: ScriptName) -> str:
    """Return the SHA-1 under which the server knows a script."""
    return hashlib.sha1(script_source(name).encode(), usedforsecurity=False).hexdigest()


class Privacy(NamedTuple):
    """What a client does for the privacy of its jobs; None leaves it to the environment."""

    encryption_keys_file: str | Path | None = None
    keep_s: int | None = None

    def open_ring(self) -> KeyRing | None:
        """Return the encryption keys, if a file with them is named here or in the environment."""
        if self.encryption_keys_file is not None:
            return load_key_ring(self.encryption_keys_file)
        return load_key_ring(os.environ.get(KEYS_VARIABLE), KEYS_VARIABLE)


class _Attempts:
    """Shared by both connections: whether a failed step is tried again, and when.

    One try can take a connect and an answer, each a third of the deadline; the last retry starts in the first third.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._started = time.monotonic()

    def check_deadline(self) -> None:
        """Raise ServerUnreachable once the deadline has passed."""
        if time.monotonic() - self._started > self._timeout_s:
            raise translated(redis.TimeoutError(f"too slow: more than {self._timeout_s:g} s"), self._url)

    def after(self, error: Exception) -> float:
        """Return the pause before the next try, or raise what the caller is to see."""
        if not is_passing(error) or time.monotonic() + RETRY_PAUSE_S > self._started + self._timeout_s / 3:
            raise translated(error, self._url) from error
        return RETRY_PAUSE_S


def sync_redis(url: str, socket_timeout_s: float) -> redis.Redis:
    """Return a synchronous redis-py client with our protocol and timeouts, and no retries of its own."""
    return redis.Redis.from_url(
        url,
        protocol=2,
        decode_responses=True,
        encoding_errors="surrogateescape",  # bytes that are no text reach the decoders, which refuse them
        socket_timeout=socket_timeout_s,
        socket_connect_timeout=socket_timeout_s,
        health_check_interval=HEALTH_CHECK_S,
        max_connections=MAX_CONNECTIONS,
        retry=Retry(NoBackoff(), 0),
        command_packer=CommandPacker(),
    )


def async_redis(url: str, connect_timeout_s: float) -> redis.asyncio.Redis:
    """Return an asyncio redis-py client with our protocol, and no retries or socket timeout of its own.

    With a socket timeout redis-py sends through `asyncio.wait_for`, which on Python 3.11 can swallow a cancellation of
    the caller's task; so callers put each exchange under `asyncio.timeout` instead.
    """
    return redis.asyncio.Redis.from_url(
        url,
        protocol=2,
        decode_responses=True,
        encoding_errors="surrogateescape",  # bytes that are no text reach the decoders, which refuse them
        socket_timeout=None,
        socket_connect_timeout=connect_timeout_s,
        health_check_interval=HEALTH_CHECK_S,
        max_connections=MAX_CONNECTIONS,
        retry=AsyncRetry(NoBackoff(), 0),
    )


class Connection:
    """A pool of synchronous connections; safe to share between threads.

    Attributes:
        url: the server's URL (with credentials: do not print it).
        keys: key names under the prefix.
        ring: the encryption keys, if a key file is named.
        timeout_s: deadline of one operation.
    """

    def __init__(self, url: str | None, prefix: str, timeout_s: float, privacy: Privacy | None = None) -> None:
        self.url = resolve_url(url)
        private = privacy or Privacy()
        self.keys = Keys(prefix, resolve_keep_s(private.keep_s))
        self.ring = private.open_ring()
        self.timeout_s = check_seconds("timeout_s", timeout_s)
        self._commands = sync_redis(self.url, self.timeout_s / 3)
        self._readers = sync_redis(self.url, READER_SOCKET_TIMEOUT_S)
        self._closed = False

    def run(self, operation: Operation[Result]) -> Result:
        """Drive an operation to its result.

        Raises:
            ServerUnreachable: no answer within the deadline.
            ServerRefused: the server answered with a refusal.
        """
        self.check_open()
        attempts = _Attempts(self.url, self.timeout_s)
        answer: object = None
        while True:
            try:
                step = operation.send(answer)
            except StopIteration as end:
                result: Result = end.value
                return result
            attempts.check_deadline()
            answer = self._answer(step, attempts)

    def reader(self) -> redis.Redis:
        """Return the pool for stream readers, whose short timeouts keep deadlines sharp."""
        self.check_open()
        return self._readers

    def check_open(self) -> None:
        """Raise LamellaError after close()."""
        if self._closed:
            raise LamellaError("this client is closed; make a new one")

    def close(self) -> None:
        """Close every connection, also those of unfinished streams; harmless when repeated."""
        self._closed = True
        for client in (self._commands, self._readers):
            client.close()
            client.connection_pool.disconnect()

    def _answer(self, step: Step, attempts: _Attempts) -> object:
        while True:
            try:
                return self._send(step)
            except (RedisError, OSError) as error:
                time.sleep(attempts.after(error))

    def _send(self, step: Step) -> object:
        if isinstance(step, ScriptCall):
            arguments = (*step.keys, *(str(value) for value in step.args))
            try:
                return self._commands.evalsha(script_digest(step.script), len(step.keys), *arguments)
            except NoScriptError as error:
                try:
                    return self._commands.eval(script_source(step.script), len(step.keys), *arguments)
                except NoPermissionError:
                    raise error from None  # whoever may only run what workers have loaded is told so
        with self._commands.pipeline(transaction=True) as pipeline:
            for command in step.commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py leaves it bare
            return pipeline.execute()


class AsyncConnection:
    """A pool of asyncio connections, for use within one event loop; parallel to `Connection`.

    Attributes:
        channels: what is published for the streams, over one connection.
        stored_reads: bounds how many streams read what is stored at once, each on a connection.
    """

    def __init__(self, url: str | None, prefix: str, timeout_s: float, privacy: Privacy | None = None) -> None:
        self.url = resolve_url(url)
        private = privacy or Privacy()
        self.keys = Keys(prefix, resolve_keep_s(private.keep_s))
        self.ring = private.open_ring()
        self.timeout_s = check_seconds("timeout_s", timeout_s)
        self._commands = async_redis(self.url, self.timeout_s / 3)
        self._readers = async_redis(self.url, READER_SOCKET_TIMEOUT_S)
        self.channels = AsyncChannels(self._readers.connection_pool)
        self.stored_reads = asyncio.Semaphore(STORED_READS)
        self._closed = False

    async def run(self, operation: Operation[Result]) -> Result:
        """Drive an operation to its result.

        Raises:
            ServerUnreachable: no answer within the deadline.
            ServerRefused: the server answered with a refusal.
        """
        self.check_open()
        attempts = _Attempts(self.url, self.timeout_s)
        answer: object = None
        while True:
            try:
                step = operation.send(answer)
            except StopIteration as end:
                result: Result = end.value
                return result
            attempts.check_deadline()
            answer = await self._answer(step, attempts)

    def reader(self) -> redis.asyncio.Redis:
        """Return the pool for stream readers, whose short timeouts keep deadlines sharp."""
        self.check_open()
        return self._readers

    def check_open(self) -> None:
        """Raise LamellaError after close()."""
        if self._closed:
            raise LamellaError("this client is closed; make a new one")

    async def close(self) -> None:
        """Close every connection, also those of unfinished streams; harmless when repeated."""
        self._closed = True
        await self.channels.close()
        for client in (self._commands, self._readers):
            await client.aclose()
            await client.connection_pool.disconnect()

    async def _answer(self, step: Step, attempts: _Attempts) -> object:
        while True:
            try:
                async with asyncio.timeout(self.timeout_s * 2 / 3):
                    return await self._send(step)
            except (RedisError, OSError) as error:  # asyncio's TimeoutError is an OSError
                await asyncio.sleep(attempts.after(error))

    async def _send(self, step: Step) -> object:
        if isinstance(step, ScriptCall):
            arguments = (*step.keys, *(str(value) for value in step.args))
            try:
                return await self._commands.evalsha(script_digest(step.script), len(step.keys), *arguments)
            except NoScriptError as error:
                try:
                    return await self._commands.eval(script_source(step.script), len(step.keys), *arguments)
                except NoPermissionError:
                    raise error from None  # as above
        async with self._commands.pipeline(transaction=True) as pipeline:
            for command in step.commands:
                pipeline.execute_command(*command)
            return await pipeline.execute()
