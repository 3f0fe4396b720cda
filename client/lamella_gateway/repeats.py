"""The jobs of a request that was sent before, so that sending it again neither computes nor bills it twice.

Two ways: an ``Idempotency-Key`` header, which is the caller's word that two requests are one; and a retry that OpenAI's
SDK makes by itself, which says so in a header and has no key: there the whole body has to be the same. Neighbours:
`generation`, ``lua/attach.lua`` (which remembers).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from starlette.requests import Request

from lamella import JobNotFound, JobState
from lamella.keys import Keys
from lamella.steps import Operation, answers, commands
from lamella_gateway.access import Caller
from lamella_gateway.api_error import ApiError
from lamella_gateway.service import Service

RETRY_COUNT = "x-stainless-retry-count"
MAX_KEY_CHARS = 255


@dataclass(frozen=True)
class Repeat:
    """How a request is known again.

    Attributes:
        key: what stands for its Idempotency-Key and its caller, None without one.
        digest: what stands for its body and its caller, empty where its sender does not retry by itself.
        is_retry: whether it was sent before.
    """

    key: str | None
    digest: str
    is_retry: bool


NO_REPEAT = Repeat(None, "", False)


def recognise(request: Request, service: Service, caller: Caller, body: bytes) -> Repeat:
    """Return how a request is known again; raises ApiError for an Idempotency-Key that cannot be one."""
    owner = "" if caller.key is None else caller.key.user
    given = request.headers.get("idempotency-key")
    if given is not None:
        if not 1 <= len(given) <= MAX_KEY_CHARS or not given.isprintable():
            raise ApiError(400, f"use 1 to {MAX_KEY_CHARS} printable characters", param="Idempotency-Key")
        return Repeat("http:" + _digest(service, "key", owner, request.url.path, given.encode()), "", False)
    count = request.headers.get(RETRY_COUNT, "")
    if not count.isdecimal():
        return NO_REPEAT
    digest = _digest(service, "body", owner, request.url.path, body)
    return Repeat(None, digest, int(count[:4]) > 0)


async def jobs_before(service: Service, repeat: Repeat, num_jobs: int) -> list[str]:
    """Return the jobs that a retried request began and that still run or are done; none if it has to begin anew."""
    if not repeat.is_retry:
        return []
    known = await service.connection.run(_remembered(service.connection.keys, repeat.digest))
    if len(known) != num_jobs:
        return []
    for job_id in known:
        try:
            status = await service.client.status(job_id)
        except JobNotFound:
            return []
        if status.state in (JobState.CANCELLED, JobState.FAILED) or status.cancel_requested:
            return []
    return known


def _remembered(keys: Keys, digest: str) -> Operation[list[str]]:
    raw = yield commands(("GET", keys.http_retry(digest)))
    return str(answers(raw)[0] or "").split()


def _digest(service: Service, kind: str, owner: str, path: str, text: bytes) -> str:
    """Return a hash of a request; where prompts lie encrypted one that does not tell a prompt that is guessed."""
    digest = hashlib.sha256(b"\0".join((kind.encode(), owner.encode(), path.encode(), text))).hexdigest()
    ring = service.connection.ring
    return digest if ring is None else ring.fingerprints(digest)[0]
