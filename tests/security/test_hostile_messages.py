"""Whatever lies in Redis or is asked for: it is read, or refused with an error of ours; nothing else happens."""

from __future__ import annotations

import contextlib
import json
import string
import sys

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella.errors import DecodeError, JobError, LamellaError, RequestError
from lamella.keys import Keys
from lamella.messages import (
    MAX_EVENT_CHARS,
    MAX_PROMPT_CHARS,
    GenerateRequest,
    TokenEvent,
    decode_event,
    decode_request,
)
from lamella.records import STATUS_FIELDS, decode_status, decode_workers
from lamella.request_draft import draft_request
from lamella.stream_order import StreamOrder

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)

# Text with everything in it that text should not have: NUL, lone surrogates, controls, digits of other scripts.
nasty_text = st.text(st.characters(), max_size=30) | st.sampled_from(
    ["\0", "\ud800", "\udcff", "٣", "²", "-1", "1e400", "NaN", "9" * 5000, "null", "true", " 1", "1_0", "\u202e", "1\n"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | nasty_text | st.just(10**4000)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(nasty_text, inner, max_size=4), max_leaves=8
)
request_like = st.fixed_dictionaries(
    {},
    optional={
        "version": st.just(1) | values,
        "kind": st.just("generate") | values,
        "model": st.just("m") | values,
        "prompt": st.just("hi") | values,
        "messages": values,
        "sampling": st.dictionaries(
            st.sampled_from(["max_tokens", "temperature", "top_k", "seed", "stop", "stop_token_ids", "x"]), values
        ),
        "extra": values,
    },
)
event_like = st.fixed_dictionaries(
    {"type": st.sampled_from(["token", "done", "failed", "cancelled", "progress", "sealed", ""]) | values},
    optional={
        "token_ids": st.lists(st.integers()) | values,
        "text": nasty_text,
        "usage": values,
        "code": values,
        "message": values,
        "finish_reason": values,
        "logprobs": values,
    },
)


def as_json(value: object) -> str:

    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(limit)


@quick
@given(request_like | values)
def test_a_request_is_read_or_refused(value: object) -> None:
    try:
        request = decode_request(as_json(value))
    except DecodeError:
        return
    assert decode_request(request.model_dump_json(exclude_none=True)) == request


@quick
@given(event_like | values)
def test_an_event_is_read_or_refused(value: object) -> None:
    try:
        event = decode_event(as_json(value))
    except DecodeError:
        return
    assert event.type in ("token", "done", "failed", "cancelled", "progress")


@quick
@given(st.binary(max_size=60) | nasty_text)
def test_bytes_and_text_that_are_no_message_are_refused(raw: bytes | str) -> None:
    for decode in (decode_event, decode_request):
        with pytest.raises(DecodeError):
            decode(raw)


@pytest.mark.parametrize("depth", [200, 100_000])
@pytest.mark.parametrize("form", ['{"a":', "["])
def test_deep_nesting_is_refused(depth: int, form: str) -> None:
    for text in (form * depth, f'{{"type":"token","token_ids":{form * depth}'):
        with pytest.raises(DecodeError):
            decode_event(text)
        with pytest.raises(DecodeError):
            decode_request(text)


@pytest.mark.parametrize("number", ["9" * 5000, "1e999", "NaN", "-1", "2147483648", "1.5", "true", '"1"', "Infinity"])
def test_numbers_that_are_no_token_are_refused(number: str) -> None:
    with pytest.raises(DecodeError):
        decode_event(f'{{"type":"token","token_ids":[{number}],"text":""}}')


def test_messages_that_are_too_long_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(DecodeError, match="too many"):
        decode_event(" " * (MAX_EVENT_CHARS + 1))
    with pytest.raises(DecodeError, match="too many"):
        decode_request(" " * (6 * MAX_PROMPT_CHARS + 8_000_001))


def test_the_longest_prompt_is_read_whatever_it_is_made_of() -> None:
    request = GenerateRequest(model="m", prompt="\0" * MAX_PROMPT_CHARS)

    assert decode_request(request.model_dump_json()) == request


@quick
@given(st.dictionaries(st.sampled_from(STATUS_FIELDS), nasty_text | st.none() | st.just("1") | st.just("queued")))
def test_a_record_is_read_or_refused(record: dict[str, str | None]) -> None:
    sound = {"v": "1", "state": "done", "model": "m", "attempts": "1", "seq": "2", "created_at": "5"}
    try:
        status = decode_status("id", [{**sound, **record}.get(field) for field in STATUS_FIELDS])
    except DecodeError:
        return
    assert status is None or status.model_dump_json()


@quick
@given(st.lists(values.map(as_json) | nasty_text | st.none(), max_size=5))
def test_heartbeats_are_read_or_left_out(beats: list[str | None]) -> None:
    assert decode_workers(beats) == []


@quick
@given(nasty_text, nasty_text, st.lists(st.tuples(nasty_text, st.dictionaries(st.just("e"), nasty_text)), max_size=3))
def test_a_stream_is_read_or_refused(state: str, seq: str, entries: list[tuple[str, dict[str, str]]]) -> None:
    for published in (state, f"{seq} {state}", f"- {state}"):
        with contextlib.suppress(LamellaError):
            StreamOrder("id", 0).live(published)
    for record in ([state, seq, state], ["running", seq, None], ["done", "1", state]):
        with contextlib.suppress(LamellaError):
            StreamOrder("id", 0).stored([record, [list(entry) for entry in entries]])


option_like = st.dictionaries(
    st.sampled_from(
        ["model", "messages", "stop", "max_tokens", "temperature", "seed", "sampling", "top_k", "nonsense"]
    ),
    values | nasty_text,
    max_size=4,
)


@quick
@given(nasty_text | values, option_like)
def test_a_submit_makes_a_request_that_can_be_sent_or_is_refused(prompt: object, options: dict[str, object]) -> None:
    try:
        request = draft_request(prompt, options).request("m")  # type: ignore[arg-type]  # anything at all
    except RequestError:
        return
    assert decode_request(request.model_dump_json(exclude_none=True)) == request


@pytest.mark.parametrize("key", ["max_tokens", "seed", "temperature", "stop", "model"])
def test_a_number_too_long_to_be_written_is_refused(key: str) -> None:
    with pytest.raises(RequestError, match=r"thousands of digits|must be|not a"):
        draft_request("hi", {key: 10**5000})


def test_a_registry_full_of_junk_gives_errors_of_ours_and_spares_sound_jobs(
    embedded_server: EmbeddedServer, embedded_redis: redis.Redis
) -> None:
    keys = Keys()
    raw = redis.Redis.from_url(embedded_server.url, protocol=2)
    with Client(embedded_server.url) as client, raw:
        sound = client.submit("hi", model="m", require_worker=False)
        junk: dict[bytes | str, bytes] = {"v": b"1", "state": b"done", "model": b"\xff\xfe", "seq": b"9" * 400}
        raw.hset(keys.job("junk"), mapping={**junk, "attempts": b"x", "created_at": b"1", "outcome": b"[[["})
        raw.hset(keys.job("state"), mapping={"v": "1", "state": "molten", "seq": "1"})
        raw.xadd(keys.stream("tokens"), {"e": b"\xc3\x28"}, id="1-0")
        raw.hset(keys.job("tokens"), mapping={"v": "1", "state": "running", "seq": "1", "lease_until": "0"})
        raw.zadd(keys.jobs, {b"junk": 9e12, b"state": 9e12, b"\xff": 9e12, b"x" * 500: 9e12})
        raw.zadd(keys.workers, {b"\xff\x00": 9e12, b"liar": 9e12})
        raw.set(keys.worker("liar"), b'{"name": "\xff"}')

        assert [job.job_id for job in client.jobs(100)] == [sound.id]
        assert client.workers() == client.models() == []
        for name in ("junk", "state", "tokens"):
            with pytest.raises((DecodeError, JobError)):
                list(client.job(name).stream(timeout_s=5))
        with pytest.raises(LamellaError):
            client.status("junk")
        assert sound.status().job_id == sound.id


def test_printable_junk_makes_no_token() -> None:
    for text in string.printable:
        with pytest.raises(DecodeError):
            decode_event(text)
    assert isinstance(decode_event('{"type":"token","token_ids":[0],"text":"\\u0000"}'), TokenEvent)
