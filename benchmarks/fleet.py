"""A fleet that is not there: workers that claim and end jobs with the product's own calls, and jobs to give them.

Owns the exchange (the Celery message taken, the claim, the terminal event) and the book of what became of every job.
No model runs and no time passes between claim and end, so what is measured is the queue. Neighbour: `fleet_sim`.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import redis

from lamella.keys import Keys
from lamella.messages import Done, GenerateRequest, SamplingParams, TokenEvent, Usage
from lamella.queue_calls import serve_call
from lamella.queue_terms import QueueTerms
from lamella.registry_calls import (
    ClaimReply,
    ClaimStatus,
    EmitReply,
    EmitStatus,
    SubmitReply,
    SubmitStatus,
    claim_call,
    emit_call,
    submit_call,
)
from lamella_worker.registry import Registry, RegistryAway, RegistryBroken

Reply = TypeVar("Reply")

MODEL = "fleet"
MAX_ATTEMPTS = 3
TOKENS = 20
LEASE_MS = 600_000
_WEIGHTS = (1.0, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Held:
    """A job that a worker has claimed."""

    number: int
    worker: int
    fence: int
    attempts: int


@dataclass
class Book:
    """What became of the jobs, by number; `ends` counts terminal events that the registry took, so each may be 1.

    Several connections write into one book, under its lock.
    """

    ends: bytearray
    tokens_by_user: Counter[int] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_ended(self) -> int:
        """Jobs with a terminal event."""
        return len(self.ends) - self.ends.count(0)

    @property
    def num_doubled(self) -> int:
        """Jobs with more than one."""
        return len(self.ends) - self.ends.count(0) - self.ends.count(1)


class Fleet:
    """Workers 0 to `num_workers` - 1 of one model, on one connection; job number n belongs to user n % `num_users`."""

    def __init__(self, client: redis.Redis, num_workers: int, num_users: int, num_jobs: int, slots: int) -> None:
        self.client = client
        self.keys = Keys()
        self.registry = Registry(client, self.keys)
        self.num_workers, self.num_users, self.slots = num_workers, num_users, slots
        self.book = Book(bytearray(num_jobs))
        self._turn = 0

    def beside(self, client: redis.Redis) -> Fleet:
        """The same workers, users and book on another connection, for another thread."""
        other = Fleet(client, self.num_workers, self.num_users, 0, self.slots)
        other.book = self.book
        return other

    def weight(self, user: int) -> float:
        """The user's share."""
        return _WEIGHTS[user % len(_WEIGHTS)]

    def set_weights(self) -> None:
        """Tell the server the users' weights."""
        with self.client.pipeline(transaction=False) as pipe:
            for user in range(self.num_users):
                pipe.hset(self.keys.user_limits(f"u{user}"), "weight", str(self.weight(user)))
            pipe.execute()

    def serve(self, workers: Sequence[int], model: str = MODEL) -> None:
        """One heartbeat of these workers."""
        for chunk in _chunks(workers, 200):
            calls = [serve_call(self.keys, f"w{worker}", model, self.slots) for worker in chunk]
            _all_well(self.registry.call_many(calls))

    def submit(self, numbers: Sequence[int]) -> list[SubmitReply]:
        """Accept these jobs in one pipeline."""
        calls = [
            submit_call(self.keys, f"{number:032x}", request_of(number), QueueTerms(f"u{number % self.num_users}"))
            for number in numbers
        ]
        replies = _all_well(self.registry.call_many(calls))
        for reply in replies:
            if reply.status is not SubmitStatus.CREATED:
                raise AssertionError(f"a submit was answered {reply}")
        return replies

    def claim(
        self, most: int, workers: Sequence[int], lease_ms: int = LEASE_MS, doomed: range = range(0)
    ) -> list[Held]:
        """Take up to `most` messages from Celery's queue and claim their jobs, for the workers in turn.

        The `doomed` get a lease of `lease_ms`, which nobody renews; the others a long one, for renewing it.
        """
        popped = self.client.rpop(self.keys.queue_list(MODEL), most)
        messages = popped if isinstance(popped, list) else []
        ids = [str(json.loads(message)["headers"]["id"]) for message in messages]
        takers = [workers[(self._turn + place) % len(workers)] for place in range(len(ids))]
        self._turn += len(ids)
        calls = [
            claim_call(self.keys, job_id, f"w{taker}", lease_ms if taker in doomed else LEASE_MS, MAX_ATTEMPTS)
            for job_id, taker in zip(ids, takers, strict=True)
        ]
        replies: list[ClaimReply] = _all_well(self.registry.call_many(calls))
        held = []
        for job_id, taker, reply in zip(ids, takers, replies, strict=True):
            if reply.status is ClaimStatus.OK:
                held.append(Held(int(job_id, 16), taker, reply.fence, reply.attempts))
            else:
                with self.book.lock:
                    self.book.refused[f"claim {reply.status.value}"] += 1
        return held

    def end(self, held: Sequence[Held]) -> list[EmitReply]:
        """Store a token event and the end of each job, in one pipeline; what the registry takes goes into the book."""
        token = TokenEvent(token_ids=tuple(range(TOKENS)), text="a finished answer")
        done = Done(finish_reason="stop", usage=Usage(prompt_tokens=15, completion_tokens=TOKENS))
        calls = [emit_call(self.keys, f"{job.number:032x}", job.fence, 1, 1000, (token, done)) for job in held]
        replies: list[EmitReply] = _all_well(self.registry.call_many(calls))
        with self.book.lock:
            for job, reply in zip(held, replies, strict=True):
                if reply.status is EmitStatus.OK:
                    self.book.ends[job.number] += 1
                    self.book.tokens_by_user[job.number % self.num_users] += 15 + TOKENS
                else:
                    self.book.refused[f"end {reply.status.value}"] += 1
        return replies

    def waiting(self) -> int:
        """Jobs in the queue's lines."""
        counts = self.client.hmget(f"{self.keys.prefix}queue:{MODEL}", ["n0", "n1", "n2"])
        return sum(int(str(count or 0)) for count in counts)


def request_of(number: int) -> GenerateRequest:
    """Job number `number`: a prompt of 60 characters."""
    prompt = f"Question {number:09d}: what does a fleet of a thousand do?".ljust(60, ".")
    return GenerateRequest(model=MODEL, prompt=prompt, sampling=SamplingParams(max_tokens=TOKENS))


def _all_well(answers: Sequence[Reply | RegistryAway | RegistryBroken]) -> list[Reply]:
    replies = []
    for answer in answers:
        if isinstance(answer, RegistryAway | RegistryBroken):
            raise answer
        replies.append(answer)
    return replies


def _chunks(values: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(values), length):
        yield values[start : start + length]
