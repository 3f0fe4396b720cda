"""Formats, tools and biases as callers give them: every usual form is taken, every mistake is named."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel

from lamella.chat import ChatMessage
from lamella.embed_draft import draft_embed
from lamella.embedding import EmbeddingsEvent
from lamella.errors import DecodeError, RequestError
from lamella.keys import Keys
from lamella.messages import GenerateRequest, SamplingParams, decode_request
from lamella.registry_calls import submit_call
from lamella.request_draft import draft_request
from lamella.response_format import JsonSchemaFormat

SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CHAT = [{"role": "user", "content": "Hello"}]


class City(BaseModel):
    name: str
    inhabitants: int


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_schema", "schema": json.dumps(SCHEMA)},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
        JsonSchemaFormat(json_schema=json.dumps(SCHEMA)),
    ],
)
def test_a_schema_may_be_given_in_every_usual_form(given: dict[str, object]) -> None:
    request = draft_request("x", {"response_format": given}).request("m")

    assert request.response_format == JsonSchemaFormat(json_schema=json.dumps(SCHEMA))
    assert decode_request(request.model_dump_json(exclude_none=True)) == request


def test_a_pydantic_model_is_its_schema() -> None:
    request = draft_request("x", {"response_format": City}).request("m")

    assert isinstance(request.response_format, JsonSchemaFormat)
    assert json.loads(request.response_format.json_schema) == City.model_json_schema()


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("x", {"response_format": "json"}, "response_format: use a mapping"),
        ("x", {"response_format": {"type": "xml"}}, "type is 'xml'; use one of 'text', 'json_object'"),
        ("x", {"response_format": {"type": "json_schema"}}, "there is no schema"),
        ("x", {"response_format": {"type": "json_schema", "schema": "{"}}, "no JSON that can be read"),
        ("x", {"response_format": {"type": "json_schema", "schema": [1]}}, "a JSON schema is an object"),
        ("x", {"response_format": {"type": "json_schema", "schema": {"a": {1, 2}}}}, "cannot be written as JSON"),
        ("x", {"response_format": {"type": "json_schema", "shema": {}}}, "unknown key 'shema'"),
        ("x", {"response_format": {"type": "regex"}}, "regex is missing"),
        ("x", {"response_format": {"type": "regex", "pattern": "a"}}, "missing|unknown key 'pattern'"),
        ("x", {"response_format": {"type": "regex", "regex": ""}}, "at least 1 character"),
        ("x", {"response_format": {"type": "regex", "regex": "\ud800"}}, "unicode|valid text"),
        ("x", {"response_format": {"type": "choice", "choice": []}}, "at least 1 item"),
        ("x", {"response_format": {"type": "choice", "choice": ["a"] * 1001}}, "at most 1000"),
        ("x", {"response_format": {"type": "grammar", "grammar": "x" * 200_001}}, "at most 200000"),
        ("x", {"response_format": {"type": "json_object"}, "ignore_eos": True}, "exclude each other"),
        ("x", {"tools": [TOOL]}, "tools need a chat"),
        (None, {"messages": CHAT, "tools": []}, "at least one"),
        (None, {"messages": CHAT, "tools": [{"name": "f"}]}, "tools\\[0\\]: it is not a function tool"),
        (None, {"messages": CHAT, "tools": [TOOL, TOOL]}, "same name"),
        (
            None,
            {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools\\[0\\].function.name is 'a b'",
        ),
        (
            None,
            {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
            "strict cannot be promised",
        ),
        (None, {"messages": CHAT, "tools": [TOOL], "tool_choice": "maybe"}, "tool_choice is 'maybe'"),
        (
            None,
            {"messages": CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "names 'x', which is not among the tools: weather",
        ),
        (None, {"messages": CHAT, "tool_choice": "required"}, "without tools"),
        (None, {"messages": CHAT, "tools": [TOOL], "response_format": {"type": "json_object"}}, "exclude each other"),
        (None, {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "tool_calls\\[0\\]"),
        (None, {"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "belongs to a tool's message"),
        (None, {"messages": [{"role": "assistant"}]}, "content is missing"),
        ("x", {"logit_bias": {"a": 1}}, "'a' is no token id"),
        ("x", {"logit_bias": {5: 101}}, "logit_bias"),
        ("x", {"logit_bias": {5: float("nan")}}, "logit_bias"),
        ("x", {"logit_bias": [5]}, "logit_bias\\[0\\] is 5"),
        ("x", {"logit_bias": dict.fromkeys(range(301), 1)}, "at most 300"),
        ("x", {"logit_bias": [(5, 1), (5, 2)]}, "two biases"),
    ],
)
def test_a_mistake_is_named(prompt: str | None, options: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        draft_request(prompt, options)


def test_biases_may_have_ids_as_text_and_order_does_not_matter() -> None:
    first = draft_request("x", {"logit_bias": {"7": -100, 5: 2.5}})
    second = draft_request("x", {"logit_bias": {5: 2.5, 7: -100}})

    assert first.sampling.logit_bias == second.sampling.logit_bias == ((5, 2.5), (7, -100.0))
    assert first.request_hash() == second.request_hash()
    assert draft_request("x", {"logit_bias": {}}).sampling.logit_bias is None


def test_calls_and_results_survive_the_wire() -> None:
    messages = [
        *CHAT,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "é"}}}
            ],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "a"},
    ]
    request = draft_request(None, {"messages": messages, "tools": [TOOL], "tool_choice": "required"}).request("m")

    assert decode_request(request.model_dump_json(exclude_none=True)) == request
    assert request.messages is not None
    assert request.messages[1].tool_calls is not None
    assert request.messages[1].tool_calls[0].function.arguments == '{"city": "é"}'


def test_only_jobs_with_something_new_are_marked_with_the_new_schema() -> None:
    plain = draft_request("x", {"temperature": 1.0, "stop": "a"}).request("m")
    chat = draft_request(None, {"messages": CHAT}).request("m")
    news = [
        draft_request("x", {"logit_bias": {1: 1}}).request("m"),
        draft_request("x", {"response_format": {"type": "json_object"}}).request("m"),
        draft_request(None, {"messages": CHAT, "tools": [TOOL]}).request("m"),
        draft_embed("m", ["x"], {}).request("m"),
    ]

    assert [submit_call(Keys(), "j", request).args[3] for request in (plain, chat)] == [1, 1]
    assert [submit_call(Keys(), "j", request).args[3] for request in news] == [2] * 4
    assert set(json.loads(chat.model_dump_json(exclude_none=True))) == {
        "version",
        "kind",
        "model",
        "messages",
        "sampling",
    }
    assert "logit_bias" not in plain.model_dump_json(exclude_none=True)


def test_the_hash_of_a_request_without_news_is_that_of_older_versions() -> None:
    asked = {
        "prompt": None,
        "messages": [{"role": "user", "content": "Hello"}],
        "model": None,
        "sampling": {name: value for name, value in SamplingParams().model_dump().items() if name != "logit_bias"},
    }
    import hashlib

    expected = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    assert draft_request(None, {"messages": CHAT}).request_hash() == expected
    other = draft_request(None, {"messages": CHAT, "tools": [TOOL]})
    assert other.request_hash() != expected
    assert (
        other.request_hash()
        != draft_request(None, {"messages": CHAT, "tools": [TOOL], "tool_choice": "none"}).request_hash()
    )


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        ("text", {}, "give a list"),
        ([], {}, "at least 1 item"),
        (["a", ""], {}, "text 1 is empty"),
        (["a", 5], {}, "texts\\[1\\] is 5"),
        (["a"] * 2049, {}, "at most 2048"),
        (["a"], {"pooling": "max"}, "pooling is 'max'"),
        (["a"], {"normalized": True}, "did you mean 'normalised'"),
    ],
)
def test_a_mistake_in_a_request_for_embeddings_is_named(texts: object, options: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        draft_embed("m", texts, options)


def test_vectors_that_are_not_whole_do_not_decode() -> None:
    with pytest.raises(ValueError, match="4 bytes are not 2 vectors"):
        EmbeddingsEvent(count=2, width=1, values="AACAPw==")
    assert EmbeddingsEvent(count=1, width=1, values="AACAPw==").vectors == ((1.0,),)


def test_a_request_of_an_unknown_kind_is_a_decode_error() -> None:
    with pytest.raises(DecodeError):
        decode_request('{"kind": "paint", "model": "m", "prompt": "x"}')
    assert isinstance(decode_request('{"model": "m", "prompt": "x", "kind": "generate"}'), GenerateRequest)


def test_a_message_without_tools_is_what_it_was() -> None:
    assert ChatMessage(role="user", content="x").text == "x"
    assert not ChatMessage(role="tool", content="x").concerns_tools
