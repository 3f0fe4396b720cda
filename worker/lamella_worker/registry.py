"""The worker's side of the job registry: sends script calls to Redis and reads streams back.

Owns the connection's behaviour (timeouts, which errors pass by themselves, scripts that Redis forgot); what a call
means is in `lamella.registry_calls`. Never retries by itself: the callers know what they may repeat, and for how long.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry

from lamella.command_packer import CommandPacker
from lamella.errors import DecodeError
from lamella.key_ring import KeyRing
from lamella.keys import Keys
from lamella.messages import JobState, TokenEvent, decode_event
from lamella.registry_calls import ClaimReply, ClaimStatus
from lamella.script_call import (
    ScriptCall,
    ScriptName,
    join_calls,
    joined_words,
    may_be_joined,
    parted_answer,
    script_source,
)

log = logging.getLogger(__name__)
Reply = TypeVar("Reply")

PAGE = 1000  # stream entries read at once
GROUP = 16  # calls sent at once
_PASSING_ERRORS = (
    redis.ConnectionError,
    redis.TimeoutError,
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
_PASSING_WORDS = ("OOM", "READONLY", "LOADING", "BUSY", "MISCONF", "NOREPLICAS", "MASTERDOWN", "NOAUTH", "NOPERM")


class RegistryAway(Exception):
    """Redis gave no answer, or one that passes by itself (full, loading, read-only); the same call may be repeated."""


class RegistryBroken(Exception):
    """Redis refused for good, or answered in a form this version does not read; repeating cannot help."""


class StreamLost(Exception):
    """A job's stored events are not the ones its record counts, so it cannot be resumed."""


def open_redis(url: str, timeout_s: float) -> redis.Redis:
    """Return a client that connects when first used; `timeout_s` bounds each connect and each answer."""
    return redis.Redis.from_url(
        url,
        protocol=2,
        decode_responses=True,
        encoding_errors="surrogateescape",  # bytes that are no text reach the decoders, which refuse them
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        health_check_interval=15,
        retry=Retry(NoBackoff(), 0),
        command_packer=CommandPacker(),
    )


class Registry:
    """The registry's scripts and reads over one connection pool; safe to use from any thread."""

    def __init__(self, client: redis.Redis, keys: Keys, ring: KeyRing | None = None) -> None:
        self.keys = keys
        self.ring = ring  # the keys of encrypted jobs, if there are any
        self._client = client
        self._shas: dict[ScriptName, str] = {}

    def call(self, call: ScriptCall[Reply]) -> Reply:
        """Run one script.

        Raises:
            RegistryAway: no answer, so it may or may not have run.
            RegistryBroken: it cannot run.
        """
        (answer,) = self.call_many([call])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call_many(
        self, calls: Iterable[ScriptCall[Reply]], notices: Sequence[tuple[str, str]] = ()
    ) -> list[Reply | RegistryAway | RegistryBroken]:
        """Run scripts in one round trip and publish `notices` (channel, text) along with them.

        They are sent in groups, each made when the one before is on its way: so the first events reach their readers
        while the last are still written. A group's emits are one call of their script; where it fails because of one
        job, each is sent again by itself, which is harmless.

        Returns:
            One entry a call, in order: its reply, or why there is none. A notice that fails is forgotten.
        """
        made: list[ScriptCall[Reply]] = []
        answers = self._send(_noted(calls, made), made, notices)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            self._shas.clear()
        again = [index for index, answer in enumerate(answers) if _is_undecided(made[index], answer)]
        if again:
            repeated: list[ScriptCall[Reply]] = []
            calls = _noted((made[index] for index in again), repeated)
            for index, answer in zip(again, self._send(calls, repeated, (), group=1), strict=True):
                answers[index] = answer
        return [_read(call, answer) for call, answer in zip(made, answers, strict=True)]

    def _send(
        self,
        calls: Iterator[ScriptCall[Reply]],
        made: list[ScriptCall[Reply]],
        notices: Sequence[tuple[str, str]],
        group: int = GROUP,
    ) -> list[object]:
        """Send what `calls` yields and notes in `made`; returns one answer for each."""
        pool = self._client.connection_pool
        sent: list[tuple[ScriptCall[Reply], ...]] = []
        try:
            connection = pool.get_connection()
            try:
                while runs := list(join_calls(islice(calls, group))):
                    _write(connection, [self._command(run) for run in runs], is_first=not sent)
                    sent += runs
                if notices:
                    _write(connection, [("PUBLISH", *notice) for notice in notices], is_first=not sent)
                answers = [answer for run in sent for answer in parted_answer(run, _answer(connection))]
                for _ in notices:
                    _answer(connection)
                return answers
            except BaseException:
                # Answers that nobody reads would be taken for those of the next commands.
                connection.disconnect()  # type: ignore[no-untyped-call]  # redis-py leaves it bare
                raise
            finally:
                pool.release(connection)
        except RedisError as error:
            return [error] * (len(made) + sum(1 for _ in calls))

    def _command(self, run: tuple[ScriptCall[Reply], ...]) -> tuple[str | int, ...]:
        return ("EVALSHA", self._sha(run[0].script), *joined_words(run))

    def _sha(self, script: ScriptName) -> str:
        if script not in self._shas:
            self._shas[script] = self._client.script_load(script_source(script))
        return self._shas[script]

    def recover_claim(self, job_id: str, worker: str) -> ClaimReply | None:
        """Return the claim that `worker` holds on a job, or None; for a claim whose answer was lost on the way.

        Raises:
            RegistryAway: Redis gave no answer.
        """
        try:
            fields = ("state", "worker", "fence", "attempts", "seq", "request")
            values = cast(list[str | None], self._client.hmget(self.keys.job(job_id), list(fields)))
        except RedisError as error:
            raise _translate(error) from error
        state, holder, fence, attempts, seq, request = values
        if state != JobState.RUNNING or holder != worker or None in (fence, attempts, seq, request):
            return None
        return ClaimReply(ClaimStatus.OK, int(fence or 0), int(attempts or 0), int(seq or 0), request or "")

    def waiting_since(self, job_id: str) -> tuple[float, float] | None:
        """When Redis took the job, and the time now, in Unix seconds by Redis's clock; None if it has no record.

        Raises:
            RegistryAway: Redis gave no answer.
        """
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.hget(self.keys.job(job_id), "created_at")
                pipe.time()
                created_at, (seconds, micros) = cast(tuple[str | None, tuple[int, int]], tuple(pipe.execute()))
        except RedisError as error:
            raise _translate(error) from error
        return None if created_at is None else (int(created_at) / 1000, int(seconds) + int(micros) / 1e6)

    def stored_token_ids(
        self, job_id: str, last_seq: int, opened: Callable[[int, str], str] = lambda seq, stored: stored
    ) -> tuple[int, ...]:
        """Read back the token ids of the job's events 1 to `last_seq`; `opened` decrypts what is stored for one.

        Raises:
            EncryptionError: `opened` cannot.
            StreamLost: they are not all there, in order and readable.
            RegistryAway: Redis gave no answer.
        """
        token_ids: list[int] = []
        seen = 0
        while seen < last_seq:
            try:
                stream, first, last = self.keys.stream(job_id), f"{seen + 1}-0", f"{last_seq}-0"
                page = cast(list[tuple[str, dict[str, str]]], self._client.xrange(stream, first, last, count=PAGE))
            except RedisError as error:
                raise _translate(error) from error
            if not page:
                raise StreamLost(f"events {seen + 1} to {last_seq} are gone from the stream")
            for entry_id, fields in page:
                seen += 1
                if entry_id != f"{seen}-0":
                    raise StreamLost(f"event {seen} is gone from the stream")
                token_ids.extend(_token_ids(fields, seen, opened))
        return tuple(token_ids)


def _token_ids(fields: dict[str, str], seq: int, opened: Callable[[int, str], str]) -> tuple[int, ...]:
    try:
        event = decode_event(opened(seq, fields.get("e", "")))
    except DecodeError as error:
        raise StreamLost(f"event {seq} is unreadable: {error}") from error
    if not isinstance(event, TokenEvent):
        raise StreamLost(f"event {seq} is {event.type}, yet the job goes on")
    return event.token_ids


def _noted(calls: Iterable[Reply], made: list[Reply]) -> Iterator[Reply]:
    for call in calls:
        made.append(call)
        yield call


def _write(connection: redis.Connection, commands: Iterable[tuple[str | int, ...]], *, is_first: bool) -> None:
    """Send commands; before the first of them a connection that was long unused is tried."""
    pack: Callable[..., list[bytes]] = connection.pack_command  # redis-py leaves it bare
    text = b"".join([part for command in commands for part in pack(*command)])
    connection.send_packed_command([text], check_health=is_first)  # type: ignore[no-untyped-call]  # as above


def _answer(connection: redis.Connection) -> object:
    try:
        return connection.read_response()
    except ResponseError as error:
        return error


def _is_undecided(call: ScriptCall[Reply], answer: object) -> bool:
    """Whether to send a call once more: the script was forgotten, or failed, maybe because of another in its group."""
    if isinstance(answer, NoScriptError):
        return True
    is_broken = isinstance(answer, RedisError) and isinstance(_translate(answer), RegistryBroken)
    return is_broken and may_be_joined(call.script)


def _read(call: ScriptCall[Reply], answer: object) -> Reply | RegistryAway | RegistryBroken:
    if isinstance(answer, RedisError):
        return _translate(answer)
    try:
        return call.decode(answer)
    except DecodeError as error:
        return RegistryBroken(str(error))


def _translate(error: RedisError) -> RegistryAway | RegistryBroken:
    if isinstance(error, NoScriptError):
        return RegistryAway("Redis keeps forgetting the scripts; it may be restarting")
    words = str(error)
    if isinstance(error, _PASSING_ERRORS) or not isinstance(error, ResponseError) or words.startswith(_PASSING_WORDS):
        return RegistryAway(f"{type(error).__name__}: {words}")
    return RegistryBroken(f"{type(error).__name__}: {words}")
