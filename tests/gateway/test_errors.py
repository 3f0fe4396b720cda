"""What is wrong with a request is said in OpenAI's envelope, with the field; nothing a user sends is a 500."""

from __future__ import annotations

import http.client
import json
from typing import Any

import openai
import pytest
import redis

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from tests.client.acting_worker import MODEL, ActingWorker
from tests.gateway.running_gateway import RunningGateway

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "Hi"}
INPUT: dict[str, Any] = {"model": MODEL, "input": "Hi"}


@pytest.fixture(scope="module")
def connection(session_server: EmbeddedServer) -> Any:
    """A connection to a gateway that all of these tests share, because none of them leaves anything."""
    with RunningGateway(session_server.url, max_body_bytes=100_000) as gateway:
        connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=40)
        yield connection
        connection.close()


def ask(
    connection: http.client.HTTPConnection, path: str, body: object, method: str = "POST", **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Send a body, as JSON unless it is bytes; the status, the error and the headers."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, sent, {"Content-Type": "application/json", **given})
    response = connection.getresponse()
    found = json.loads(response.read())
    assert set(found) == {"error"}, found
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return response.status, found["error"], {name.lower(): value for name, value in response.getheaders()}


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("chat/completions", {**CHAT, "temperature": 3}, "temperature", "less than or equal to 2"),
        ("chat/completions", {**CHAT, "temperature": "hot"}, "temperature", "valid number"),
        ("chat/completions", {**CHAT, "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ("chat/completions", {**CHAT, "xyzzy": 1}, "xyzzy", "unknown field"),
        ("chat/completions", {"model": MODEL}, "messages", "missing"),
        ("chat/completions", {**CHAT, "messages": []}, "messages", "at least 1"),
        ("chat/completions", {**CHAT, "messages": "Hi"}, "messages", "Roles are"),
        ("chat/completions", {**CHAT, "messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'system'"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user"}]}, "messages[0]", "missing"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": ""}]}, None, "no text"),
        (
            "chat/completions",
            {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "content is text",
        ),
        ("chat/completions", {**CHAT, "n": 0}, "n", "greater than or equal to 1"),
        ("chat/completions", {**CHAT, "n": True}, "n", "valid integer"),
        ("chat/completions", {**CHAT, "n": 17}, "n", "less than or equal to 16"),
        ("chat/completions", {**CHAT, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ("chat/completions", {**CHAT, "max_tokens": 1, "max_completion_tokens": 2}, None, "max_tokens and"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, None, "top_logprobs needs logprobs"),
        ("chat/completions", {**CHAT, "logit_bias": {"five": 1}}, None, "token ids as text"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, None, "without tools"),
        ("chat/completions", {**CHAT, "response_format": {"type": "x"}}, "response_format", "formats served"),
        ("chat/completions", {**CHAT, "store": True}, "store", "POST /v1/responses"),
        ("chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, None, "needs stream"),
        ("chat/completions", {**CHAT, "stop": [""]}, "stop[0]", "at least 1 character"),
        ("chat/completions", {**CHAT, "seed": 2**64}, "seed", "less than"),
        ("chat/completions", {**CHAT, "user": "a\u0000b"}, None, "printable"),
        ("chat/completions", [], None, "object"),
        ("completions", {**TEXT, "echo": True}, "echo", "not repeated"),
        ("completions", {**TEXT, "suffix": "x"}, "suffix", "not filled in"),
        ("completions", {**TEXT, "prompt": [1, 2, 3]}, "prompt[0]", "token ids are not taken"),
        ("completions", {**TEXT, "best_of": 3}, None, "not ranked"),
        ("completions", {**TEXT, "prompt": ["x"] * 60, "n": 2}, None, "more than 64"),
        ("responses", {**INPUT, "background": True, "store": False}, None, "has to be stored"),
        ("responses", {**INPUT, "tools": [{"type": "web_search"}]}, None, "Only function tools"),
        ("responses", {**INPUT, "truncation": "auto"}, "truncation", "never cut"),
        ("responses", {**INPUT, "input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None, "content"),
        ("responses", {**INPUT, "metadata": {"k": 1}}, "metadata.k", "valid string"),
        ("responses", {**INPUT, "previous_response_id": "resp_1"}, "previous_response_id", "there is no response"),
    ],
    ids=str,
)
def test_a_mistake_is_named_with_its_field(
    connection: http.client.HTTPConnection,
    embedded_redis: redis.Redis,
    path: str,
    body: object,
    param: str | None,
    said: str,
) -> None:
    ActingWorker(embedded_redis).announce()

    status, error, _ = ask(connection, f"/v1/{path}", body)

    assert status == (404 if param == "previous_response_id" else 400)
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]
    assert error["param"] == param or (param is None and status == 400)
    assert embedded_redis.zcard("lamella:jobs") == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"nonsense",
        b"[" * 100_000,
        b'{"model": "\\ud800"}',
        b'{"a": NaN}',
        b"null",
        b'"x"',
        b"7",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_request_is_refused(connection: http.client.HTTPConnection, body: bytes) -> None:
    for path in ("chat/completions", "completions", "responses"):
        status, error, _ = ask(connection, f"/v1/{path}", body)

        assert status in (400, 413)
        assert error["message"]


def test_a_body_that_is_too_large_is_refused_by_its_length_or_while_it_comes(
    connection: http.client.HTTPConnection,
) -> None:
    whole = ask(connection, "/v1/completions", b" " * 100_001)[0]
    connection.close()
    pieces = iter([b" " * 60_000, b" " * 60_000])
    connection.request("POST", "/v1/completions", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    chunked = connection.getresponse().status
    connection.close()

    assert (whole, chunked) == (413, 413)


def test_a_body_that_is_not_declared_as_json_is_refused(connection: http.client.HTTPConnection) -> None:
    status, error, _ = ask(connection, "/v1/completions", TEXT, Content_Type="text/plain")

    assert status == 415
    assert "application/json" in error["message"]


def test_paths_and_methods_that_are_not_served_are_said(connection: http.client.HTTPConnection) -> None:
    assert ask(connection, "/v1/nothing", b"")[0] == 404
    status, _, headers = ask(connection, "/v1/chat/completions", b"", "DELETE")

    assert status == 405
    assert headers["allow"] == "POST"
    assert headers["x-request-id"].startswith("req_")


def test_an_unknown_model_is_404_and_one_without_workers_503(
    connection: http.client.HTTPConnection, embedded_server: EmbeddedServer, worker: ActingWorker
) -> None:
    with Client(embedded_server.url) as client:
        client.submit("before", model="known/before", require_worker=False)

    unknown = ask(connection, "/v1/completions", {**TEXT, "model": "never/seen"})
    strange = ask(connection, "/v1/completions", {**TEXT, "model": "../../etc"})
    away = ask(connection, "/v1/completions", {**TEXT, "model": "known/before"})

    assert [unknown[0], unknown[1]["code"], unknown[1]["param"]] == [404, "model_not_found", "model"]
    assert strange[0] == 404
    assert [away[0], away[1]["code"]] == [503, "model_unavailable"]
    assert int(away[2]["retry-after"]) >= 1


@pytest.mark.parametrize(("limit", "code"), [("model_queued", "queue_full"), ("user_queued", "user_limit_reached")])
def test_a_full_queue_is_429_with_a_time_to_come_back(
    connection: http.client.HTTPConnection,
    embedded_server: EmbeddedServer,
    worker: ActingWorker,
    limit: str,
    code: str,
) -> None:
    with Client(embedded_server.url) as client:
        client.set_limits(**{limit: 0})

    status, error, headers = ask(connection, "/v1/chat/completions", CHAT)

    assert (status, error["type"], error["code"]) == (429, "rate_limit_error", code)
    assert int(headers["retry-after"]) >= 1


def test_choices_that_do_not_all_fit_leave_none_behind(
    connection: http.client.HTTPConnection, embedded_server: EmbeddedServer, worker: ActingWorker
) -> None:
    with Client(embedded_server.url) as client:
        client.set_limits(user_tokens=100)

    status, error, _ = ask(connection, "/v1/completions", {**TEXT, "n": 4, "max_tokens": 40})

    assert status == 429
    assert error["code"] == "user_limit_reached"
    assert worker.redis.zcard(worker.keys.active) == 0


def test_a_server_that_is_away_is_503(own_server: EmbeddedServer) -> None:
    with RunningGateway(own_server.url) as gateway, gateway.client() as sdk:
        own_server.stop()

        with pytest.raises(openai.InternalServerError) as caught:
            sdk.chat.completions.create(**CHAT)

    assert caught.value.status_code == 503
    assert caught.value.code == "queue_unavailable"
    assert "sock" not in caught.value.message, "the server's address is nobody's business"


def test_a_strange_host_is_refused_where_no_key_is_asked_for(connection: http.client.HTTPConnection) -> None:
    status, error, _ = ask(connection, "/v1/models", b"", "GET", Host="evil.example:80")

    assert status == 403
    assert error["code"] == "host_not_allowed"
