"""The worker's connection to the registry: scripts that Redis forgot, answers that never came, streams read back."""

from __future__ import annotations

from collections.abc import Iterator

import fakeredis
import pytest
import redis

from lamella.keys import Keys
from lamella.messages import Cancelled, TokenEvent
from lamella.registry_calls import (
    ClaimReply,
    ClaimStatus,
    EmitReply,
    EmitStatus,
    NudgeStatus,
    claim_call,
    emit_call,
    nudge_call,
)
from lamella.script_call import ScriptCall
from lamella_worker import registry as registry_module
from lamella_worker.registry import GROUP, Registry, RegistryAway, RegistryBroken, StreamLost
from tests.worker.conftest import Jobs


def claim(registry: Registry, job_id: str, worker: str = "w1"):  # type: ignore[no-untyped-def]  # a test's shorthand
    return registry.call(claim_call(registry.keys, job_id, worker, 5000, 3))


def store(registry: Registry, job_id: str, fence: int, first_seq: int, *token_ids: int) -> None:
    events = [TokenEvent(token_ids=(token_id,), text="x") for token_id in token_ids]
    registry.call(emit_call(registry.keys, job_id, fence, first_seq, 5000, events))


def test_scripts_that_redis_forgot_are_loaded_again(registry: Registry, jobs: Jobs, fake_redis: redis.Redis) -> None:
    jobs.submit("a")
    jobs.submit("b")
    claim(registry, "a")
    fake_redis.script_flush()

    reply = claim(registry, "b")

    assert reply.status is ClaimStatus.OK


def test_calls_in_one_round_trip_answer_each_for_itself(registry: Registry, jobs: Jobs) -> None:
    jobs.submit("a")

    answers = registry.call_many([nudge_call(registry.keys, job, "tiny", 1000) for job in ("a", "none")])

    assert answers == [NudgeStatus.WAITING, NudgeStatus.GONE]


def test_more_calls_than_go_out_at_once_are_answered_in_order_also_when_scripts_are_forgotten(
    registry: Registry, jobs: Jobs, fake_redis: redis.Redis
) -> None:
    names = [f"job-{number}" for number in range(2 * GROUP + 3)]
    for name in names[::2]:
        jobs.submit(name)
    claim(registry, names[0])
    fake_redis.script_flush()

    calls = (claim_call(registry.keys, name, "w1", 5000, 3) for name in names)
    answers = registry.call_many(calls, notices=[("news", "one"), ("news", "two")])

    statuses = [answer.status for answer in answers if isinstance(answer, ClaimReply)]
    ok, held, missing = ClaimStatus.OK, ClaimStatus.HELD, ClaimStatus.MISSING
    assert statuses == [held, *([missing, ok] * (GROUP + 1))]


def test_a_job_whose_record_is_broken_costs_the_others_of_its_group_nothing(
    registry: Registry, jobs: Jobs, fake_redis: redis.Redis
) -> None:
    names = [f"job-{number}" for number in range(GROUP + 2)]
    for name in names:
        jobs.submit(name)
    fences = [claim(registry, name).fence for name in names]
    fake_redis.delete(registry.keys.job(names[3]))
    fake_redis.set(registry.keys.job(names[3]), "not a hash")
    event = TokenEvent(token_ids=(7,), text="x")

    calls = [emit_call(registry.keys, name, fence, 1, 5000, [event]) for name, fence in zip(names, fences, strict=True)]
    answers = registry.call_many(calls)

    broken = answers.pop(3)
    assert isinstance(broken, RegistryBroken)
    assert "WRONGTYPE" in str(broken)
    assert answers == [EmitReply(EmitStatus.OK, cancel_requested=False)] * (GROUP + 1)
    assert [fake_redis.xlen(registry.keys.stream(name)) for name in names] == [1, 1, 1, 0, *[1] * (GROUP - 2)]


def test_emits_that_go_as_one_call_answer_each_for_itself(
    registry: Registry, jobs: Jobs, fake_redis: redis.Redis
) -> None:
    names = ("ok", "cancelled", "behind", "lost", "renewed", "two", "ended")
    for name in names:
        jobs.submit(name)
    fences = {name: claim(registry, name).fence for name in names}
    fake_redis.hset(registry.keys.job("cancelled"), "cancel", 1)
    event = TokenEvent(token_ids=(7,), text="x")

    def emit(name: str, first_seq: int, *events: TokenEvent | Cancelled, fence: int = 0) -> ScriptCall[EmitReply]:
        return emit_call(registry.keys, name, fence or fences.get(name, 1), first_seq, 5000, events)

    with_end = [emit("ok", 1, event), emit("ended", 1, event, Cancelled()), emit("two", 1, event, event)]
    without = [
        emit("cancelled", 1, event),
        emit("behind", 3, event),
        emit("lost", 1, event, fence=99),
        emit("none", 1, event),
        emit("renewed", 0),
        emit("two", 3, event),
    ]
    answers = registry.call_many([*with_end, *without])

    ok = EmitReply(EmitStatus.OK, cancel_requested=False)
    stop = EmitReply(EmitStatus.OK, cancel_requested=True)
    refused = [EmitReply(status, False) for status in (EmitStatus.GAP, EmitStatus.FENCED, EmitStatus.MISSING)]
    assert answers == [ok, ok, ok, stop, *refused, ok, ok]
    assert registry.stored_token_ids("two", 3) == (7, 7, 7)
    assert fake_redis.hmget(registry.keys.job("two"), "seq", "tokens") == ["3", "3"]
    assert fake_redis.hmget(registry.keys.job("renewed"), "seq", "tokens") == ["0", "0"]


def test_a_call_that_cannot_be_made_leaves_no_answer_behind_for_the_next(registry: Registry, jobs: Jobs) -> None:
    jobs.submit("a")

    def calls() -> Iterator[ScriptCall[ClaimReply]]:
        for _ in range(GROUP):
            yield claim_call(registry.keys, "none", "w1", 5000, 3)
        raise ValueError("a terminal event must be the last one")

    with pytest.raises(ValueError, match="terminal"):
        registry.call_many(calls())

    assert claim(registry, "a").status is ClaimStatus.OK


def test_a_server_that_is_away_is_told_from_a_refusal(
    registry: Registry, jobs: Jobs, fake_server: fakeredis.FakeServer, fake_redis: redis.Redis
) -> None:
    jobs.submit("a")
    fake_redis.set(registry.keys.job("wrong"), "not a hash")

    fake_server.connected = False
    with pytest.raises(RegistryAway):
        claim(registry, "a")
    fake_server.connected = True
    with pytest.raises(RegistryBroken, match="WRONGTYPE"):
        claim(registry, "wrong")

    assert claim(registry, "a").status is ClaimStatus.OK


def test_a_claim_whose_answer_was_lost_is_found_again_by_its_worker_only(registry: Registry, jobs: Jobs) -> None:
    jobs.submit("a")
    made = claim(registry, "a", "w1")

    assert registry.recover_claim("a", "w1") == made
    assert registry.recover_claim("a", "w2") is None
    assert registry.recover_claim("none", "w1") is None


def test_stored_tokens_are_read_back_in_order_across_pages(
    registry: Registry, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "PAGE", 3)
    jobs.submit("a")
    fence = claim(registry, "a").fence
    store(registry, "a", fence, 1, *range(10, 17))

    assert registry.stored_token_ids("a", 7) == tuple(range(10, 17))
    assert registry.stored_token_ids("a", 0) == ()


def test_a_stream_with_a_hole_is_not_resumed(registry: Registry, jobs: Jobs, fake_redis: redis.Redis) -> None:
    jobs.submit("a")
    fence = claim(registry, "a").fence
    store(registry, "a", fence, 1, 1, 2, 3)
    fake_redis.xdel(registry.keys.stream("a"), "2-0")

    with pytest.raises(StreamLost, match="event 2"):
        registry.stored_token_ids("a", 3)


def test_a_stream_that_vanished_is_not_resumed(registry: Registry, jobs: Jobs, fake_redis: redis.Redis) -> None:
    jobs.submit("a")
    fence = claim(registry, "a").fence
    store(registry, "a", fence, 1, 1, 2)
    fake_redis.delete(registry.keys.stream("a"))

    with pytest.raises(StreamLost, match="events 1 to 2"):
        registry.stored_token_ids("a", 2)


def test_an_unreadable_event_is_not_resumed(registry: Registry, fake_redis: redis.Redis, keys: Keys) -> None:
    fake_redis.xadd(keys.stream("a"), {"e": '{"type": "token of the future"}'}, id="1-0")

    with pytest.raises(StreamLost, match="event 1 is unreadable"):
        registry.stored_token_ids("a", 1)
