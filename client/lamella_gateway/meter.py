"""Rates, quotas and bills of API keys: what a request must pass before it makes jobs, and what is booked afterwards.

Owns the calls of ``admit.lua``, ``attach.lua`` and ``settle.lua``. Neighbours: `access` (who asks), `generation` and
`billed_submit` (whose jobs are attached), `settler` (which settles what ended).
"""

from __future__ import annotations

from typing import NamedTuple

from lamella.connection import AsyncConnection
from lamella.keys import HTTP_RETRY_TTL_S, Keys
from lamella.operations import check_job_id
from lamella.script_call import ScriptName, read_integer, read_items, read_text, script_call
from lamella.steps import Operation, answers, commands
from lamella_gateway.api_error import ApiError
from lamella_gateway.api_keys import ApiKey

NOBODY = "-"  # in a bill: no key pays
SETTLED_AT_ONCE = 500


class Bill(NamedTuple):
    """Who pays for a job, of which day's quota, and how much was reserved for it."""

    key_id: str
    day: int
    reserved: int

    def __str__(self) -> str:
        """Return it as it is stored."""
        return f"{self.key_id} {self.day} {self.reserved}"


class Attachment(NamedTuple):
    """What the gateway ties to a job; empty text is nothing."""

    bill: Bill | None = None
    response: str = ""
    retry_digest: str = ""
    retry_jobs: str = ""


class Meter:
    """Holds keys to their quotas; stateless, all it knows lies in Redis."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._keys = connection.keys

    async def admit(self, key: ApiKey, tokens: int) -> int:
        """Count a request, reserve `tokens` for it, and return the day they count for.

        Raises:
            ApiError: 429 where a rate or quota is reached, 401 where the key is gone.
        """
        return await self._connection.run(admit(self._keys, key, tokens))

    async def attach(self, job_id: str, attachment: Attachment) -> None:
        """Tie what the gateway knows of a job to it; harmless when repeated, and if the job is gone."""
        await self._connection.run(attach(self._keys, job_id, attachment))

    async def refund(self, bill: Bill | None) -> None:
        """Give back what was reserved for a job that never came to be."""
        if bill is not None:
            await self._connection.run(give_back(self._keys, bill))

    async def settle(self, job_id: str) -> bool:
        """Book what a job used if it has ended; False while it has not."""
        call = script_call(ScriptName.SETTLE, self._keys, (self._keys.job(check_job_id(job_id)),), (job_id,), read_text)
        return read_text(await self._connection.run(_asked(call))) == "settled"

    async def forget(self, job_id: str) -> None:
        """Take away a job's response now, and the job itself as soon as it has ended."""
        await self._connection.run(_forget(self._keys.job(job_id), self._keys.unbilled, job_id))
        await self.settle(job_id)

    async def unbilled(self, cursor: int) -> tuple[int, list[str]]:
        """Return some of the jobs whose use is not booked yet, and where to go on (0: that was all)."""
        raw = await self._connection.run(_scan(self._keys.unbilled, cursor))
        after, flat = raw[0], answers(raw[1]) if not isinstance(raw[1], dict) else list(raw[1])
        ids = list(flat) if isinstance(raw[1], dict) else flat[::2]
        return int(str(after)), [str(job_id) for job_id in ids]


def admit(keys: Keys, key: ApiKey, tokens: int, *, is_paced: bool = True) -> Operation[int]:
    """Count a request, reserve `tokens` for it, and return the day they count for; raises as `Meter.admit`.

    With `is_paced` False its requests per minute do not hold it up.
    """
    pace = "paced" if is_paced else "free"
    call = script_call(ScriptName.ADMIT, keys, (), (key.key_id, tokens, pace), lambda raw: raw)
    verdict, retry_ms, spent, day = read_items((yield from _asked(call)), "admit", 4)
    match read_text(verdict):
        case "ok":
            return read_integer(day)
        case "rate":
            raise _too_fast(key, read_integer(retry_ms) / 1000)
        case "tokens":
            raise _spent(key, tokens, read_integer(spent), read_integer(retry_ms) / 1000)
    raise ApiError(401, "this API key no longer exists; ask for a new one", code="invalid_api_key")


def attach(keys: Keys, job_id: str, attachment: Attachment) -> Operation[bool]:
    """Tie what the gateway knows of a job to it; False if the job is gone."""
    args = (
        job_id,
        str(attachment.bill) if attachment.bill is not None else "",
        attachment.response,
        attachment.retry_digest,
        attachment.retry_jobs,
        HTTP_RETRY_TTL_S,
    )
    call = script_call(ScriptName.ATTACH, keys, (keys.job(job_id),), args, lambda raw: raw)
    return read_integer((yield from _asked(call))) == 1


def give_back(keys: Keys, bill: Bill) -> Operation[None]:
    """Give back what was reserved for a job that never came to be."""
    yield commands(("DECRBY", keys.api_day(bill.key_id, bill.day), bill.reserved))


def is_billed(keys: Keys, job_id: str) -> Operation[bool]:
    """Return whether a job's use is booked, or will be when it has ended."""
    raw = yield commands(("HMGET", keys.job(job_id), "billed"), ("HMGET", keys.unbilled, job_id))
    return any(answers(each)[0] is not None for each in answers(raw))


def _asked(call: object) -> Operation[object]:
    return (yield call)  # type: ignore[misc]  # a ScriptCall of any reply is a step


def _forget(record: str, unbilled: str, job_id: str) -> Operation[None]:
    yield commands(
        ("HSET", record, "forget", 1),
        ("HDEL", record, "response"),
        ("HSETNX", unbilled, job_id, f"{NOBODY} 0 0"),
    )


def _scan(key: str, cursor: int) -> Operation[list[object]]:
    raw = yield commands(("HSCAN", key, cursor, "COUNT", SETTLED_AT_ONCE))
    answer = answers(raw)[0]
    return list(answer) if isinstance(answer, list | tuple) else answers(answer)


def _too_fast(key: ApiKey, retry_s: float) -> ApiError:
    return ApiError(
        429,
        f"this key may make {key.requests_per_minute} requests a minute; try again in {retry_s:.1f} s",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_s=retry_s,
    )


def _spent(key: ApiKey, tokens: int, spent: int, retry_s: float) -> ApiError:
    return ApiError(
        429,
        f"this key may use {key.tokens_per_day} tokens a day; {spent} are used or reserved, and this request may take "
        f"{tokens} (prompt and max_tokens). Ask for a smaller max_tokens, or wait for the next day (UTC)",
        type="insufficient_quota",
        code="insufficient_quota",
        retry_after_s=retry_s,
    )
