"""A queue and one who works it off, for tests of the order in which jobs are sent."""

from __future__ import annotations

import json

import redis

from lamella.keys import Keys
from lamella.messages import Done, GenerateRequest, Priority, SamplingParams, Usage, decode_event
from lamella.queue_calls import Outlook, outlook_call, serve_call
from lamella.queue_terms import QueueTerms
from lamella.registry_calls import (
    ClaimStatus,
    SubmitReply,
    submit_call,
)
from tests.client.acting_worker import MODEL, ActingWorker, call, token

KEYS = Keys()
COST = 101  # of each job here: a prompt of one token and 100 to come


class Service:
    """Submits jobs and ends them in the order in which they are sent."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.worker = ActingWorker(client)
        self.started: list[str] = []

    def serve(self, slots: int) -> None:
        call(self.client, serve_call(KEYS, "w", MODEL, slots))

    def submit(
        self,
        job_id: str,
        user: str = "anonymous",
        priority: Priority = Priority.NORMAL,
        deadline_s: float | None = None,
        *,
        ignore_eos: bool = False,
    ) -> SubmitReply:
        sampling = SamplingParams(max_tokens=100, ignore_eos=ignore_eos)
        request = GenerateRequest(model=MODEL, prompt="hi", sampling=sampling)
        return call(self.client, submit_call(KEYS, job_id, request, QueueTerms(user, priority, deadline_s)))

    def start(self) -> str | None:
        """Take the next message, claim its job, and return its id."""
        raw = self.client.rpop(KEYS.queue_list(MODEL))
        if raw is None:
            return None
        job_id = str(json.loads(str(raw))["headers"]["id"])
        if self.worker.claim(job_id).status is not ClaimStatus.OK:
            return None
        self.started.append(job_id)
        return job_id

    def end(self, job_id: str, num_tokens: int = 100, run_s: float = 0.0) -> None:
        """End a running job after so many tokens, as if it had run so long."""
        started_at = int(self.client.hget(KEYS.job(job_id), "started_at") or 0)
        self.client.hset(KEYS.job(job_id), "started_at", started_at - int(run_s * 1000))
        usage = Usage(prompt_tokens=1, completion_tokens=num_tokens)
        self.worker.emit(job_id, token("a"), Done(finish_reason="stop", usage=usage))

    def run(self, count: int, num_tokens: int = 100, run_s: float = 0.0) -> list[str]:
        """Start and end so many jobs, one after the other, and return their ids in order."""
        before = len(self.started)
        for _ in range(count):
            job_id = self.start()
            if job_id is None:
                break
            self.end(job_id, num_tokens, run_s)
        return self.started[before:]

    def sent(self) -> set[str]:
        return set(self.client.zrange(KEYS.flight(MODEL), 0, -1))

    def state(self, job_id: str) -> str | None:
        return self.client.hget(KEYS.job(job_id), "state")

    def outcome(self, job_id: str) -> object:
        return decode_event(self.client.hget(KEYS.job(job_id), "outcome") or "")

    def outlook(self, job_id: str) -> Outlook:
        return call(self.client, outlook_call(KEYS, job_id))
