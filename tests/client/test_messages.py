"""What does not decode on the wire, and what does."""

from __future__ import annotations

import json

import pytest

from lamella.errors import DecodeError
from lamella.messages import Done, Progress, TokenEvent, Usage, check_model_name, decode_event, decode_request
from lamella.records import STATUS_FIELDS, decode_outcome, decode_status, decode_workers
from lamella.registry_calls import encode_event


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "not json",
        "[]",
        "{}",
        '{"type": "surprise"}',
        '{"type": "token"}',
        '{"type": "token", "token_ids": ["x"], "text": "a"}',
        '{"type": "token", "token_ids": [1], "text": "a", "extra": 1}',
        '{"type": "done", "finish_reason": "bored", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}',
        '{"type": "done", "finish_reason": "stop", "usage": {"prompt_tokens": -1, "completion_tokens": 1}}',
        b"\xff\xfe",
    ],
)
def test_a_malformed_event_is_a_decode_error(raw: str | bytes) -> None:
    with pytest.raises(DecodeError, match="schema 2"):
        decode_event(raw)


@pytest.mark.parametrize(
    "raw",
    ["", "{}", '{"model": "m", "prompt": "x", "version": 2}', '{"model": "../m", "prompt": "x"}', '{"model": "m"}'],
)
def test_a_malformed_request_is_a_decode_error(raw: str) -> None:
    with pytest.raises(DecodeError, match="schema 2"):
        decode_request(raw)


@pytest.mark.parametrize(
    "event",
    [
        TokenEvent(token_ids=(1, 2), text="ab"),
        Done(finish_reason="length", usage=Usage(prompt_tokens=1, completion_tokens=2, run_s=0.5)),
    ],
)
def test_an_event_survives_the_wire(event: TokenEvent | Done) -> None:
    assert decode_event(encode_event(event)) == event


def test_only_terminal_events_are_outcomes() -> None:
    with pytest.raises(DecodeError, match="token"):
        decode_outcome(encode_event(TokenEvent(token_ids=(1,), text="a")))
    with pytest.raises(DecodeError, match="progress"):
        decode_outcome(Progress(prefilled_tokens=1, prompt_tokens=2).model_dump_json())


def test_a_record_of_another_schema_is_a_decode_error() -> None:
    values = ["3", "queued", *[None] * (len(STATUS_FIELDS) - 2)]

    with pytest.raises(DecodeError, match="schema"):
        decode_status("j1", values)


def test_a_record_with_broken_fields_is_a_decode_error() -> None:
    values = ["1", "queued", "m", "many", *[None] * (len(STATUS_FIELDS) - 4)]

    with pytest.raises(DecodeError, match="malformed"):
        decode_status("j1", values)


def test_an_unreadable_heartbeat_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    assert decode_workers([None, "{}"]) == []
    assert "left out a worker" in caplog.text


def test_the_heartbeat_of_a_newer_worker_is_read() -> None:
    model = {
        "name": "m",
        "family": "f",
        "dtype": "d",
        "num_layers": 1,
        "context_length": 1,
        "size_bytes": 1,
        "later": 1,
    }
    numbers = ("pid", "slots", "running", "started_at", "heartbeat_at", "sweeps", "tokens", "streamed_bytes")
    beat = {"name": "w", "host": "h", "version": "99", "device": "cpu", "model": model, "draining": False}
    beat |= dict.fromkeys((*numbers, "peak_rss_bytes"), 1) | {"last_sweep_at": None, "from_the_future": {"x": 1}}

    assert [worker.name for worker in decode_workers([json.dumps(beat)])] == ["w"]


@pytest.mark.parametrize("name", ["m", "owner/name", "Qwen/Qwen3-0.6B", "a.b_c-d", "owner/name@0123abc"])
def test_model_names(name: str) -> None:
    assert check_model_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/..", "/etc/passwd", "a/b/c", ".hidden", "a/.b", "a b", "a\n", "a@xyz", "a\\b", "é", "a" * 201],
)
def test_names_that_could_escape_the_store_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a model name"):
        check_model_name(name)
