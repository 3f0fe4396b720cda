"""What the tests of the registry's scripts ask it, and the fields that they look at."""

from __future__ import annotations

import redis

from lamella.keys import Keys
from lamella.messages import GenerateRequest, decode_event
from lamella.queue_calls import serve_call
from lamella.registry_calls import Idempotency, SubmitReply, submit_call
from tests.client.acting_worker import MODEL, call

KEYS = Keys()


def submit(
    client: redis.Redis,
    job_id: str = "j1",
    prompt: str = "hello",
    idempotency: Idempotency | None = None,
    slots: int = 100,
) -> SubmitReply:
    request = GenerateRequest(model=MODEL, prompt=prompt)
    call(client, serve_call(KEYS, "serving", MODEL, slots))
    return call(client, submit_call(KEYS, job_id, request, None, idempotency))


def expire_lease(client: redis.Redis, job_id: str = "j1") -> None:
    client.hset(KEYS.job(job_id), "lease_until", 1)


def events(client: redis.Redis, job_id: str = "j1") -> list[tuple[str, str]]:
    return [(entry, decode_event(fields["e"]).type) for entry, fields in client.xrange(KEYS.stream(job_id))]


def state(client: redis.Redis, job_id: str = "j1") -> str | None:
    return client.hget(KEYS.job(job_id), "state")
