"""Whatever happens in whatever order: no job is lost, none ends twice, and counters fit what is there."""

from __future__ import annotations

import json
from collections import Counter

import fakeredis
import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lamella.keys import Keys
from lamella.messages import GenerateRequest, Priority, SamplingParams
from lamella.queue_calls import expire_call, serve_call, tend_call
from lamella.queue_terms import QueueTerms
from lamella.registry_calls import (
    ClaimStatus,
    EmitStatus,
    ReleaseStatus,
    RetryStatus,
    cancel_call,
    emit_call,
    nudge_call,
    release_call,
    retry_call,
    submit_call,
)
from tests.client.acting_worker import MODEL, ActingWorker, call, done, token

KEYS = Keys()
FINAL = ("done", "failed", "cancelled")
USERS = ("ann", "bob", "cat")


class QueueMachine(RuleBasedStateMachine):
    """Clients, workers that die, messages that get lost, on one server."""

    @initialize(slots=st.integers(0, 3))
    def open(self, slots: int) -> None:
        self.client = fakeredis.FakeRedis(decode_responses=True)
        self.worker = ActingWorker(self.client)
        self.ids: list[str] = []
        self.running: list[str] = []
        self.most_slots = slots
        self.serve(slots)

    @rule(slots=st.integers(0, 3))
    def serve(self, slots: int) -> None:
        self.most_slots = max(slots, self.most_slots)
        call(self.client, serve_call(KEYS, "w", MODEL, slots))

    @rule(
        user=st.sampled_from(USERS),
        priority=st.sampled_from(Priority),
        deadline_s=st.none() | st.just(1000.0),
        size=st.integers(1, 50),
    )
    def submit(self, user: str, priority: Priority, deadline_s: float | None, size: int) -> None:
        job_id = f"j{len(self.ids)}"
        request = GenerateRequest(model=MODEL, prompt="x" * size, sampling=SamplingParams(max_tokens=size))
        for _ in range(1 + size % 2):  # an answer that was lost is asked for again
            call(self.client, submit_call(KEYS, job_id, request, QueueTerms(user, priority, deadline_s)))
        self.ids.append(job_id)

    @rule(is_lost=st.booleans())
    def take_message(self, is_lost: bool) -> None:
        raw = self.client.rpop(KEYS.queue_list(MODEL))
        if raw is None or is_lost:
            return
        job_id = json.loads(str(raw))["headers"]["id"]
        fence, seq = self.worker.fences.get(job_id, 0), self.worker.seqs.get(job_id, 0)
        if self.worker.claim(job_id).status is ClaimStatus.OK:
            self.running.append(job_id)
        else:
            self.worker.fences[job_id], self.worker.seqs[job_id] = fence, seq

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(0, 3), ends=st.booleans())
    def emit(self, data: st.DataObject, num_tokens: int, ends: bool) -> None:
        job_id = data.draw(st.sampled_from(self.running))
        events = [*(token("a") for _ in range(num_tokens)), *([done(num_tokens)] if ends else [])]
        first = self.worker.seqs[job_id] + 1
        self.worker.emit(job_id, *events)
        self.worker.emit_at(job_id, first, events)
        if ends:
            self.running.remove(job_id)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), gives_back=st.booleans())
    def release(self, data: st.DataObject, gives_back: bool) -> None:
        job_id = data.draw(st.sampled_from(self.running))
        self.running.remove(job_id)
        for _ in range(2):
            call(self.client, release_call(KEYS, job_id, self.worker.fences[job_id], gives_back))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.running))
        self.running.remove(job_id)
        if self.client.hget(KEYS.job(job_id), "state") == "running":
            self.client.hset(KEYS.job(job_id), "lease_until", 1)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def die_until_dead(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.running))
        self.running.remove(job_id)
        while self.client.hget(KEYS.job(job_id), "state") == "running":
            self.client.hset(KEYS.job(job_id), "lease_until", 1)
            fence, seq = self.worker.fences[job_id], self.worker.seqs[job_id]
            if self.worker.claim(job_id).status is not ClaimStatus.OK:
                self.worker.fences[job_id], self.worker.seqs[job_id] = fence, seq

    @precondition(lambda self: any(self.worker.fences.values()))
    @rule(data=st.data(), ends=st.booleans())
    def write_under_an_old_fence(self, data: st.DataObject, ends: bool) -> None:
        job_id = data.draw(st.sampled_from([job_id for job_id, fence in self.worker.fences.items() if fence]))
        fence = data.draw(st.integers(0, self.worker.fences[job_id] - 1))
        before = self.client.hgetall(KEYS.job(job_id)), self.client.xrange(KEYS.stream(job_id))
        next_seq = int(before[0]["seq"]) + 1
        events = [done()] if ends else [token("stale")]

        reply = call(self.client, emit_call(KEYS, job_id, fence, next_seq, 1000, events))
        released = call(self.client, release_call(KEYS, job_id, fence, True))

        assert reply.status is EmitStatus.FENCED
        assert released is ReleaseStatus.FENCED
        assert (self.client.hgetall(KEYS.job(job_id)), self.client.xrange(KEYS.stream(job_id))) == before

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        job_id, new_id = data.draw(st.sampled_from(self.ids)), f"j{len(self.ids)}"
        first, again = (call(self.client, retry_call(KEYS, job_id, new_id)) for _ in range(2))
        if first.status is RetryStatus.RETRIED:
            assert again.job_id == first.job_id, "the same new job, however often it is asked for"
            if first.job_id == new_id:
                self.ids.append(new_id)

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        call(self.client, cancel_call(KEYS, data.draw(st.sampled_from(self.ids))))

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def deadline_passes(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.ids))
        if self.client.zscore(KEYS.deadlines, job_id) is not None:
            self.client.zadd(KEYS.deadlines, {job_id: 1})
            self.client.hset(KEYS.job(job_id), "deadline", 1)

    @rule(most=st.integers(1, 3))
    def expire(self, most: int) -> None:
        call(self.client, expire_call(KEYS, most))

    @rule(limit=st.none() | st.integers(0, 2))
    def limit_running(self, limit: int | None) -> None:
        if limit is None:
            self.client.hdel(KEYS.limits, "user_running")
        else:
            self.client.hset(KEYS.limits, "user_running", limit)

    @rule()
    def reconcile(self) -> None:
        call(self.client, tend_call(KEYS, MODEL))
        for job_id in self.client.zrange(KEYS.flight(MODEL), 0, -1):
            self.client.hset(KEYS.job(job_id), "nudged_at", 1)
            call(self.client, nudge_call(KEYS, job_id, MODEL, 1))

    @invariant()
    def counters_fit_what_is_there(self) -> None:
        if not hasattr(self, "client"):
            return
        jobs = {job_id: self.client.hgetall(KEYS.job(job_id)) for job_id in self.ids}
        live = {job_id: job for job_id, job in jobs.items() if job["state"] not in FINAL}
        ready = {job_id for job_id, job in live.items() if job["place"] == "ready"}
        sent = live.keys() - ready
        assert set(self.client.zrange(KEYS.flight(MODEL), 0, -1)) == sent
        assert set(self.client.zrange(KEYS.active, 0, -1)) == live.keys()
        assert set(self.client.zrange(KEYS.deadlines, 0, -1)) <= live.keys()
        assert all(job["state"] == "queued" for job_id, job in live.items() if job_id in ready)
        assert all("place" not in job for job in jobs.values() if job["state"] in FINAL)
        assert len(sent) <= self.most_slots + 1
        book = self.client.hgetall(f"{KEYS.prefix}queue:{MODEL}")
        for rank in range(3):
            self.check_class(
                rank, {job_id: live[job_id] for job_id in ready if live[job_id]["class"] == str(rank)}, book
            )
        assert int(book.get("tf", 0)) == sum(int(live[job_id]["cost"]) for job_id in sent)
        for user in USERS:
            mine = {job_id: job for job_id, job in live.items() if job["user"] == user}
            share = self.client.hgetall(f"{KEYS.prefix}share:{MODEL}:{user}")
            assert int(share.get("queued", 0)) == len(mine.keys() & ready)
            assert int(share.get("sent", 0)) == len(mine.keys() & sent)
            assert int(share.get("tokens", 0)) == sum(int(job["cost"]) for job in mine.values())

    def check_class(self, rank: int, waiting: dict[str, dict[str, str]], book: dict[str, str]) -> None:
        assert int(book.get(f"n{rank}", 0)) == len(waiting)
        assert int(book.get(f"t{rank}", 0)) == sum(int(job["cost"]) for job in waiting.values())
        lines = Counter(job["user"] for job in waiting.values())
        for user in USERS:
            line = self.client.zrange(f"{KEYS.prefix}ready:{MODEL}:{rank}:{user}", 0, -1)
            assert set(line) == {job_id for job_id, job in waiting.items() if job["user"] == user}
            assert line == sorted(line, key=lambda job_id: int(waiting[job_id]["order"])), "first come, first served"
        kinds = {
            kind: set(self.client.zrange(f"{KEYS.prefix}{kind}:{MODEL}:{rank}", 0, -1))
            for kind in ("ready", "held", "spent")
        }
        assert kinds["ready"] | kinds["held"] == set(lines)
        assert sum(map(len, kinds.values())) == len(set().union(*kinds.values()))

    @invariant()
    def streams_have_no_gap_and_one_end(self) -> None:
        for job_id in getattr(self, "ids", ()):
            entries = self.client.xrange(KEYS.stream(job_id))
            assert [entry for entry, _ in entries] == [f"{n + 1}-0" for n in range(len(entries))]
            kinds = [json.loads(fields["e"])["type"] for _, fields in entries]
            is_final = self.client.hget(KEYS.job(job_id), "state") in FINAL
            assert sum(kind != "token" for kind in kinds) == is_final
            assert not is_final or kinds[-1] != "token"

    def teardown(self) -> None:
        """With workers that live and no limits, every job ends."""
        if not hasattr(self, "client"):
            return
        self.limit_running(None)
        self.serve(3)
        for job_id in list(self.running):
            self.running.remove(job_id)
            if self.client.hget(KEYS.job(job_id), "state") == "running":
                self.client.hset(KEYS.job(job_id), "lease_until", 1)
        for _ in range(10 * len(self.ids) + 10):
            self.reconcile()
            self.take_message(False)
            for job_id in list(self.running):
                self.running.remove(job_id)
                self.worker.emit(job_id, done())
        assert all(self.client.hget(KEYS.job(job_id), "state") in FINAL for job_id in self.ids)
        self.counters_fit_what_is_there()
        left = {str(key) for key in self.client.scan_iter(f"{KEYS.prefix}share:*")}
        assert not left, "a user without jobs leaves nothing behind"
        self.client.close()


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(
    max_examples=20,
    stateful_step_count=35,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
    phases=(Phase.explicit, Phase.generate),  # the first failure is told as it is: shrinking takes minutes
    derandomize=True,
)
