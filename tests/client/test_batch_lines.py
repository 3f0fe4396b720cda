"""Lines of a batch: both forms are read, every mistake is named, and answers look as they were asked for."""

from __future__ import annotations

import io
import json

import pytest

from lamella.batch_body import BodyDefaults, submit_arguments
from lamella.batch_form import SubmitForm
from lamella.batch_lines import MAX_LINE_BYTES, BatchError, BatchUrl, RawLine, parse_line, raw_lines
from lamella.batch_results import answer_record, error_code, error_record, read_record_id
from lamella.batch_tasks import BatchTasks
from lamella.chat import FunctionCall, ToolCall
from lamella.completion import Completion
from lamella.errors import JobCancelled, JobFailed, JobNotFound, NoWorkerError
from lamella.messages import TokenLogprob, Usage

MODEL = "tiny/model"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def request(**changes: object) -> bytes:
    record = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT, **changes}
    return json.dumps({key: value for key, value in record.items() if value is not ...}).encode()


def asked(raw: bytes) -> None:
    line = parse_line(RawLine(1, raw))
    submit_arguments(line.url, line.body)


def test_lines_are_numbered_as_in_an_editor() -> None:
    file = io.BytesIO(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"b": 2}')

    assert list(raw_lines(file)) == [(1, b'{"a": 1}'), (4, b'{"b": 2}')]


def test_a_line_without_end_is_not_held_in_memory() -> None:
    file = io.BytesIO(b"x" * (2 * MAX_LINE_BYTES + 5) + b"\n{}\n" + b"y" * MAX_LINE_BYTES)

    assert list(raw_lines(file)) == [(1, None), (2, b"{}"), (3, None)]


@pytest.mark.parametrize(
    ("raw", "code", "says"),
    [
        (b"not json", "invalid_json", "not JSON"),
        (b'{"a": 1', "invalid_json", "at character 7"),
        (b'"text"', "invalid_json", "'text'; an object"),
        (b"[1]", "invalid_json", "a list"),
        (b"\xff{}", "invalid_json", "not UTF-8"),
        (b"[" * 200_000, "invalid_json", "nested too deeply"),
        (b'{"prompt": NaN}', "invalid_json", "NaN"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "invalid_json", "not JSON"),
        (b"{}", "invalid_line", "neither url and body"),
        (b'{"custom_id": "x", "text": 1}', "invalid_line", "neither url and body"),
        (request(custom_id=...), "invalid_line", "custom_id is missing"),
        (request(custom_id=3), "invalid_line", "custom_id is 3"),
        (request(custom_id=""), "invalid_line", "custom_id is ''"),
        (request(custom_id="x" * 600), "invalid_line", "1 to 512"),
        (request(custom_id="\ud800"), "invalid_line", "surrogate"),
        (request(method="GET"), "invalid_line", "method is 'GET'"),
        (request(method=...), "invalid_line", "method is null"),
        (request(url="/v1/embeddings"), "invalid_url", "/v1/chat/completions"),
        (request(url=["x"]), "invalid_url", "url is a list"),
        (request(body=[]), "invalid_line", "body is a list"),
        (request(more=1), "invalid_line", "unknown key 'more'"),
        (request(body={}), "invalid_request", "model is missing"),
        (request(body={"model": MODEL}), "invalid_request", "no prompt"),
        (request(body={"model": "../x", **{"messages": CHAT["messages"]}}), "invalid_request", "not a model name"),
        (request(body={**CHAT, "prompt": "x"}), "unknown_parameter", "'prompt'"),
        (request(body={**CHAT, "messages": "x"}), "invalid_request", "messages is of type str"),
        (request(body={**CHAT, "messages": []}), "invalid_request", "no text"),
        (request(body={**CHAT, "messages": ["x"]}), "invalid_request", "messages[0]"),
        (request(body={**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), *[
            "unsupported_parameter", "'image_url'"]),
        (request(body={**CHAT, "max_token": 3}), "unknown_parameter", "'max_token'"),
        (request(body={**CHAT, "max_tokens": 0}), "invalid_request", "max_tokens is 0"),
        (request(body={**CHAT, "max_tokens": 1, "max_completion_tokens": 2}), "invalid_request", "differ"),
        (request(body={**CHAT, "temperature": "hot"}), "invalid_request", "temperature is 'hot'"),
        (request(body={**CHAT, "temperature": True}), "invalid_request", "temperature is True"),
        (request(body={**CHAT, "n": 2}), "unsupported_parameter", "a line for each sample"),
        (request(body={**CHAT, "n": True}), "unsupported_parameter", "n is True"),
        (request(body={**CHAT, "stream": True}), "unsupported_parameter", "no stream"),
        (request(body={**CHAT, "stream_options": {}}), "unsupported_parameter", "stream_options"),
        (request(body={**CHAT, "logprobs": 3}), "invalid_request", "true or false"),
        (request(body={**CHAT, "top_logprobs": 3}), "invalid_request", "without logprobs"),
        (request(body={**CHAT, "logprobs": True, "top_logprobs": 99}), "invalid_request", "logprobs is 99"),
        (request(body={**CHAT, "user": 3}), "invalid_request", "user is '3'"),
        (request(url="/v1/completions", body={"model": MODEL, "prompt": ["a", "b"]}), "invalid_request", "a line for"),
        (request(url="/v1/completions", body={"model": MODEL, "prompt": [1, 2]}), "invalid_request", "a line for"),
        (request(url="/v1/completions", body={"model": MODEL, "prompt": "a", "suffix": "b"}), *[
            "unsupported_parameter", "only continued"]),
        (request(url="/v1/completions", body={"model": MODEL, "prompt": "a", "top_logprobs": 1}), *[
            "unknown_parameter", "top_logprobs"]),
        (b'{"prompt": "a", "messages": [], "model": "m"}', "invalid_request", "prompt and messages"),
        (b'{"prompt": "", "model": "m"}', "invalid_request", "prompt is empty"),
        (b'{"prompt": "a", "model": "m", "idempotency_key": "k"}', "unknown_parameter", "idempotency_key"),
        (b'{"prompt": "a", "model": "m", "require_worker": false}', "unknown_parameter", "require_worker"),
        (b'{"prompt": "\\ud800", "model": "m"}', "invalid_request", "surrogate"),
    ],
)  # fmt: skip
def test_a_bad_line_says_what_is_wrong(raw: bytes, code: str, says: str) -> None:
    with pytest.raises(BatchError) as caught:
        asked(raw)

    assert caught.value.code == code
    assert says in str(caught.value)


def test_a_body_becomes_the_arguments_of_a_submit() -> None:
    body = {
        "model": MODEL,
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]},
            {"role": "user", "content": "hi"},
        ],
        "max_completion_tokens": 5,
        "temperature": 1,
        "top_p": 1,
        "stop": "end",
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 1,
        "stream": False,
        "user": "u",
        "tools": None,
        "response_format": {"type": "text"},
    }

    prompt, options = submit_arguments(BatchUrl.CHAT, body)

    options.pop("response_format", None)
    assert prompt is None
    assert options == {
        "model": MODEL,
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "temperature": 1.0,
        "top_p": 1.0,
        "stop": "end",
        "seed": 3,
        "logprobs": 2,
        "user": "u",
    }


def test_defaults_fill_what_a_line_leaves_open_and_a_model_goes_before_all() -> None:
    defaults = BodyDefaults(max_tokens=9, temperature=0.5, fallback_model="other")

    _, bare = submit_arguments(BatchUrl.PLAIN, {"prompt": "a"}, defaults)
    _, own = submit_arguments(BatchUrl.PLAIN, {"prompt": "a", "max_tokens": 2, "model": MODEL}, defaults)
    _, forced = submit_arguments(BatchUrl.PLAIN, {"prompt": "a", "model": MODEL}, BodyDefaults(model="forced"))

    assert bare == {"model": "other", "max_tokens": 9, "temperature": 0.5}
    assert own == {"model": MODEL, "max_tokens": 2, "temperature": 0.5}
    assert forced == {"model": "forced"}


def test_an_answer_looks_like_openais() -> None:
    logprobs = (TokenLogprob(token_id=7, logprob=-0.5, top=((7, -0.5), (8, -1.5))),)
    completion = Completion("j", "hi", (7,), "stop", Usage(prompt_tokens=3, completion_tokens=1), logprobs)
    line = parse_line(RawLine(4, request()))

    record = json.loads(answer_record("0" * 16, line, MODEL, completion))

    body = record["response"]["body"]
    assert (record["custom_id"], record["error"], record["response"]["status_code"]) == ("a", None, 200)
    assert (body["object"], body["model"]) == ("chat.completion", MODEL)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hi"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]["token"] == "token_id:8"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}


def test_tools_and_formats_are_given_on() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "when?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "c"},
    ]
    body = {"model": MODEL, "messages": messages, "tools": [tool], "tool_choice": "auto", "logit_bias": {"7": -100}}

    _, with_tools = submit_arguments(BatchUrl.CHAT, body)
    _, with_format = submit_arguments(BatchUrl.CHAT, {**CHAT, "response_format": {"type": "json_object"}})

    assert with_tools["tools"] == [tool]
    assert with_tools["logit_bias"] == {"7": -100}
    assert with_format["response_format"] == {"type": "json_object"}


def test_calls_of_tools_are_in_the_answer() -> None:
    call = ToolCall(id="c", function=FunctionCall(name="now", arguments="{}"))
    usage = Usage(prompt_tokens=3, completion_tokens=1)
    completion = Completion("j", "", (7,), "tool_calls", usage, tool_calls=(call,))

    chat = json.loads(answer_record("0" * 16, parse_line(RawLine(1, request())), MODEL, completion))
    plain = json.loads(answer_record("0" * 16, parse_line(RawLine(1, b'{"prompt": "a"}')), MODEL, completion))

    message = chat["response"]["body"]["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == plain["tool_calls"]
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}


def test_a_record_tells_its_batch_and_line() -> None:
    record = error_record("0123456789abcdef", 17, None, BatchError("invalid_json", "the line is not JSON", "x"))

    assert read_record_id(record.encode()) == ("0123456789abcdef", 17)
    assert json.loads(record)["error"] == {
        "code": "invalid_json",
        "message": "the line is not JSON",
        "line": 17,
        "param": "x",
    }
    assert read_record_id(b'{"id": "batch_req_123", "custom_id": null}') is None


def test_errors_have_codes() -> None:
    errors = [JobFailed("j", "deadline", "m"), JobCancelled("j"), NoWorkerError("m", ()), JobNotFound("j")]

    assert [error_code(error) for error in errors] == ["deadline", "cancelled", "model_not_served", "job_not_found"]


def test_a_custom_id_may_come_once() -> None:
    source = io.BytesIO(request() + b"\n" + request(custom_id="b") + b"\n" + request() + b"\n")

    tasks = {task.number: task for task in BatchTasks(source, "0" * 16, SubmitForm())}

    assert [tasks[number].error is None for number in (1, 2, 3)] == [True, True, False]
    assert "that of line 1" in str(tasks[3].error)


def test_a_custom_id_of_an_earlier_run_counts() -> None:
    source = io.BytesIO(request() + b"\n" + request() + b"\n")

    (task,) = BatchTasks(source, "0" * 16, SubmitForm(), last=1)

    assert (task.number, task.place) == (2, 0)
    assert task.error is not None


def test_keys_differ_by_line_output_request_and_attempt() -> None:
    source = b'{"prompt": "a", "model": "m"}\n{"prompt": "a", "model": "m"}\n'

    def keys(name: str, source: bytes) -> list[str | None]:
        tasks = list(BatchTasks(io.BytesIO(source), "0" * 16, SubmitForm(), place_name=name))
        return [task.draft(attempt).idempotency_key for task in tasks for attempt in (0, 1)]

    all_keys = [*keys("x", source), *keys("y", source), *keys("x", source.replace(b'"a"', b'"b"'))]

    assert len(set(all_keys)) == 12
    assert keys("x", source) == all_keys[:4]


def test_long_lines_are_asked_first_and_alike_ones_in_their_order() -> None:
    lengths = [51, 50, 900, 52, 51, 200, 900, 50]
    lines = [{"prompt": f"p{place}", "model": "m", "max_tokens": length} for place, length in enumerate(lengths)]
    source = b"".join(json.dumps(line).encode() + b"\n" for line in lines) + b"nonsense\n"

    tasks = list(BatchTasks(io.BytesIO(source), "0" * 16, SubmitForm()))

    assert [task.place for task in tasks] == [2, 6, 5, 0, 1, 3, 4, 7, 8]


def test_a_window_does_not_hold_the_whole_input() -> None:
    source = io.BytesIO(b'{"prompt": "a", "model": "m"}\n' * 10_000)

    tasks = iter(BatchTasks(source, "0" * 16, SubmitForm()))
    next(tasks)

    assert source.tell() < 100_000
    assert [task.place for task in tasks] == list(range(1, 10_000))
