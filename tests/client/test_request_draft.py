"""Mistakes in a call, each named with its key, its value and the fix."""

from __future__ import annotations

import pytest

from lamella.errors import RequestError
from lamella.messages import MAX_PROMPT_CHARS, ChatMessage, SamplingParams
from lamella.request_draft import draft_request


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        (None, {}, "no prompt"),
        (b"bytes", {}, "decode it first"),
        (["a"], {}, "messages=\\[...\\]"),
        (5, {}, "not int"),
        ("", {}, "prompt is empty"),
        ("\ud800", {}, "not valid text"),
        ("x" * (MAX_PROMPT_CHARS + 1), {}, "at most 4000000"),
        ("x", {"messages": [{"role": "user", "content": "y"}]}, "exactly one"),
        (None, {"messages": []}, "no text"),
        (None, {"messages": [{"role": "user", "content": ""}]}, "no text"),
        (None, {"messages": "hello"}, "type str"),
        (None, {"messages": ["hello"]}, "messages\\[0\\]"),
        (None, {"messages": [{"role": "boss", "content": "x"}]}, "messages\\[0\\].role is 'boss'"),
        (None, {"messages": [{"role": "user"}]}, "content is missing"),
        (None, {"messages": [{"role": "user", "content": 5}]}, "messages\\[0\\].content is 5"),
        (None, {"messages": [{"role": "user", "content": "x", "name": "y"}]}, "unknown key 'messages\\[0\\].name'"),
        ("x", {"max_tokens": 0}, "max_tokens is 0: .*greater than or equal to 1"),
        ("x", {"max_tokens": -3}, "max_tokens is -3"),
        ("x", {"max_tokens": "5"}, "max_tokens is '5'"),
        ("x", {"max_tokens": True}, "max_tokens is True"),
        ("x", {"max_tokens": 10**9}, "max_tokens is 1000000000"),
        ("x", {"temperature": float("nan")}, "temperature is nan"),
        ("x", {"temperature": -1}, "temperature is -1"),
        ("x", {"top_p": 0}, "top_p is 0"),
        ("x", {"stop": 5}, "stop is 5: .*list"),
        ("x", {"stop": [""]}, "stop\\[0\\]"),
        ("x", {"seed": -1}, "seed is -1"),
        ("x", {"temprature": 0.5}, "unknown key 'temprature'; did you mean 'temperature'\\?"),
        ("x", {"zzz": 1}, "unknown key 'zzz'; known keys: max_tokens"),
        ("x", {"sampling": {"max_tokens": 5}}, "SamplingParams"),
        ("x", {"model": "../x"}, "not a model name"),
        ("x", {"model": "a/.."}, "not a model name"),
        ("x", {"model": "/abs/path"}, "not a model name"),
        ("x", {"model": 5}, "model is 5"),
        ("x", {"idempotency_key": ""}, "idempotency_key is ''"),
        ("x", {"idempotency_key": 5}, "idempotency_key is 5"),
        ("x", {"require_worker": "no"}, "require_worker is 'no'"),
    ],
)
def test_a_mistake_is_named(prompt: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        draft_request(prompt, options)


def test_single_keys_beat_the_sampling_given_as_a_whole() -> None:
    draft = draft_request("x", {"sampling": SamplingParams(max_tokens=5, top_k=3), "max_tokens": 7})

    assert (draft.sampling.max_tokens, draft.sampling.top_k) == (7, 3)


def test_stop_may_be_one_text_or_a_list() -> None:
    assert draft_request("x", {"stop": "end"}).sampling.stop == ("end",)
    assert draft_request("x", {"stop": ["a", "b"]}).sampling.stop == ("a", "b")


def test_a_seed_is_drawn_only_where_sampling_needs_one() -> None:
    greedy = draft_request("x", {}).request("m")
    drawn = draft_request("x", {"temperature": 1.0}).request("m")
    fixed = draft_request("x", {"temperature": 1.0, "seed": 7}).request("m")

    assert greedy.sampling.seed is None
    assert drawn.sampling.seed is not None
    assert fixed.sampling.seed == 7


def test_the_hash_is_that_of_what_was_asked() -> None:
    first = draft_request("x", {"temperature": 1.0})

    assert first.request_hash() == draft_request("x", {"temperature": 1}).request_hash()
    assert first.request_hash() != draft_request("y", {"temperature": 1.0}).request_hash()
    assert first.request_hash() != draft_request("x", {"temperature": 1.0, "seed": 1}).request_hash()


def test_messages_may_be_typed_or_plain() -> None:
    plain = draft_request(None, {"messages": [{"role": "user", "content": "x"}]})
    typed = draft_request(None, {"messages": [ChatMessage(role="user", content="x")]})

    assert plain == typed


def test_a_long_prompt_is_not_repeated_in_the_error() -> None:
    with pytest.raises(RequestError) as caught:
        draft_request(None, {"messages": [{"role": "user", "content": "secret" * 100, "x": 1}]})

    assert "secret" not in str(caught.value)
