"""The registry's other side for client tests: claims and emits as a worker does, step by step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

import redis

from lamella.keys import DEFAULT_PREFIX, Keys
from lamella.messages import Done, Failed, ModelInfo, TerminalEvent, TokenEvent, Usage, WorkerInfo
from lamella.registry_calls import ClaimReply, EmitReply, claim_call, emit_call
from lamella.script_call import ScriptCall, script_source

Reply = TypeVar("Reply")

MODEL = "tiny/model"
ANNOUNCED_S = 600  # no heartbeat follows, and a test machine may stand still for a while


def call(client: redis.Redis, script_call: ScriptCall[Reply]) -> Reply:
    """Run a script call."""
    source = script_source(script_call.script)
    return script_call.decode(client.eval(source, len(script_call.keys), *script_call.keys, *script_call.args))


def token(text: str, token_id: int = 1) -> TokenEvent:
    return TokenEvent(token_ids=(token_id,), text=text)


def done(tokens: int = 1) -> Done:
    return Done(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=tokens))


def failed() -> Failed:
    return Failed(code="prompt_too_long", message="the prompt has 9 tokens, the context 8; shorten it")


class ActingWorker:
    """A worker without an engine: announces itself, and emits what the test says."""

    def __init__(self, client: redis.Redis, name: str = "acting", model: str = MODEL, lease_ms: int = 60_000) -> None:
        self.redis = client
        self.keys = Keys(DEFAULT_PREFIX)
        self.name = name
        self.model = model
        self.lease_ms = lease_ms
        self.fences: dict[str, int] = {}
        self.seqs: dict[str, int] = {}

    def announce(self, *, draining: bool = False) -> WorkerInfo:
        now = time.time()
        info = WorkerInfo(
            name=self.name,
            host="here",
            pid=1,
            version="0.1.0",
            device="cpu",
            model=ModelInfo(
                name=self.model, family="llama", dtype="float32", num_layers=4, context_length=512, size_bytes=1000
            ),
            slots=4,
            running=0,
            draining=draining,
            started_at=now,
            heartbeat_at=now,
            last_sweep_at=None,
            sweeps=0,
            tokens=0,
            streamed_bytes=0,
            peak_rss_bytes=123_000_000,
        )
        self.redis.set(self.keys.worker(self.name), info.model_dump_json(), ex=ANNOUNCED_S)
        self.redis.zadd(self.keys.workers, {self.name: now * 1000})
        self.redis.set(self.keys.capacity(self.model), 0 if draining else info.slots, ex=ANNOUNCED_S)
        return info

    def claim(self, job_id: str, max_attempts: int = 3) -> ClaimReply:
        reply = call(self.redis, claim_call(self.keys, job_id, self.name, self.lease_ms, max_attempts))
        self.fences[job_id] = reply.fence
        self.seqs[job_id] = reply.seq
        return reply

    def emit(self, job_id: str, *events: TokenEvent | TerminalEvent) -> EmitReply:
        reply = self.emit_at(job_id, self.seqs[job_id] + 1, events)
        self.seqs[job_id] += len(events)
        return reply

    def emit_at(self, job_id: str, first_seq: int, events: Sequence[TokenEvent | TerminalEvent]) -> EmitReply:
        return call(
            self.redis, emit_call(self.keys, job_id, self.fences[job_id], first_seq, self.lease_ms, tuple(events))
        )

    def run(self, job_id: str, *texts: str) -> None:
        """Claim the job, emit one token a text, and finish."""
        assert self.claim(job_id).status == "ok"
        for text in texts:
            self.emit(job_id, token(text))
        self.emit(job_id, done(len(texts)))
