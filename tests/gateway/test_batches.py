"""Batches over HTTP, with OpenAI's own SDK as the client: checked whole, answered in order, billed, ended early."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from openai.types import Batch

from lamella.connection import Connection
from lamella.embedded import EmbeddedServer
from lamella.messages import Cancelled, Priority
from lamella_gateway.api_keys import read_use, revoke_key
from lamella_gateway.batch_record import BatchRecord
from lamella_gateway.batch_store import BatchStore
from tests.client.acting_worker import MODEL, ActingWorker, done, token
from tests.client.answering_worker import AnsweringWorker as Patient
from tests.gateway.batch_lines import CHAT, all_running, begin, chat_line, ended, line, records, texts, upload
from tests.gateway.conftest import MakeKey
from tests.gateway.running_gateway import AnsweringWorker, RunningGateway
from tests.waiting import wait_until


@pytest.fixture
def connection(embedded_server: EmbeddedServer) -> Iterator[Connection]:
    connection = Connection(embedded_server.url, "lamella:", 10.0)
    yield connection
    connection.close()


def test_every_line_is_answered_in_its_order(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    lines = [chat_line(number, f"{number}{'x' * (number * 7 % 13)}") for number in range(40)]

    with Patient(worker, refuses=["3" + "x" * 8]) as patient:
        made = begin(sdk, lines, metadata={"for": "me"})
        batch = ended(sdk, made)

    outputs, errors = records(sdk, batch.output_file_id), records(sdk, batch.error_file_id)
    numbers = [number for number in range(40) if number != 3]
    assert (made.status, batch.status, batch.metadata, batch.model) == ("validating", "completed", {"for": "me"}, MODEL)
    assert [each["custom_id"] for each in outputs] == [f"c{number}" for number in numbers]
    assert texts(outputs) == {f"c{number}": f"<{number}{'x' * (number * 7 % 13)}>" for number in numbers}
    assert [each["custom_id"] for each in errors] == ["c3"]
    assert errors[0]["response"]["status_code"] == 400  # type: ignore[index]  # it is JSON
    assert errors[0]["response"]["body"]["error"]["code"] == "context_length_exceeded"  # type: ignore[index]  # as above
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 40, "completed": 39, "failed": 1}
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (39 * 3, 39)
    assert sorted(patient.asked) == sorted(f"{number}{'x' * (number * 7 % 13)}" for number in range(40))
    assert {file.purpose for file in sdk.files.list()} == {"batch", "batch_output"}


@pytest.mark.parametrize(
    ("url", "body", "expected"),
    [
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, lambda body: [c["index"] for c in body["choices"]]),
        ("/v1/embeddings", {"input": ["a", "b"]}, lambda body: [e["index"] for e in body["data"]]),
        ("/v1/responses", {"input": "a"}, lambda body: body["output"][0]["content"][0]["text"]),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 3}, lambda body: len(body["choices"])),
    ],
    ids=["completions", "embeddings", "responses", "chat"],
)
def test_lines_are_what_the_endpoint_takes_and_brings(
    sdk: openai.OpenAI, answering: AnsweringWorker, url: str, body: dict[str, object], expected: object
) -> None:
    batch = ended(sdk, begin(sdk, [line(number, url, {"model": MODEL, **body}) for number in range(3)], endpoint=url))

    outputs = records(sdk, batch.output_file_id)
    shown = [expected(each["response"]["body"]) for each in outputs]  # type: ignore[operator,index]  # a function; JSON
    wanted = {"/v1/completions": [0, 1, 2, 3], "/v1/embeddings": [0, 1], "/v1/responses": "Hello there", CHAT: 3}
    assert batch.status == "completed"
    assert shown == [wanted[url]] * 3


async def test_the_async_client_does_the_same(gateway: RunningGateway, answering: AnsweringWorker) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=40) as sdk:
        file = await sdk.files.create(file=("a.jsonl", json.dumps(chat_line(1)).encode()), purpose="batch")
        batch = await sdk.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        with gateway.client() as waiting:
            ended(waiting, batch)
        found = await sdk.batches.retrieve(batch.id)
        content = await sdk.files.content(found.output_file_id or "")
        listed = [each.id async for each in sdk.batches.list(limit=1)]

    assert texts([json.loads(content.text)]) == {"c1": "Hello there"}
    assert listed == [batch.id]


def test_an_input_is_checked_whole_before_anything_is_asked(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    lines = [
        chat_line(1),
        "",
        "{not json",
        chat_line(1),
        line(5, "/v1/completions", {"model": MODEL, "prompt": "a"}),
        chat_line(6, temperature=9),
        chat_line(7, stream=True),
        chat_line(8, colour="red"),
        chat_line(9, model="nobody/knows"),
        {"custom_id": "c10", "method": "GET", "url": CHAT, "body": {}},
        {"prompt": "the plain form", "model": MODEL},
        {"method": "POST", "url": CHAT, "body": {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}},
    ]

    batch = ended(sdk, begin(sdk, lines))

    assert batch.errors is not None
    found = [(each.line, each.code, each.param) for each in batch.errors.data or []]
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert found == [
        (3, "invalid_json", None),
        (4, "duplicate_custom_id", "custom_id"),
        (5, "invalid_url", "url"),
        (6, "invalid_value", "body.temperature"),
        (7, "unsupported_parameter", "body.stream"),
        (8, "unknown_parameter", "body.colour"),
        (9, "model_not_found", "body.model"),
        (10, "invalid_line", "method"),
        (11, "invalid_line", None),
        (12, "invalid_line", "custom_id"),
    ]
    assert answering.prompts == []


@pytest.mark.parametrize(
    ("lines", "code", "number"), [(["", " "], "empty_file", None), (["{}"] * 50_001, "too_many_lines", 50_001)]
)
def test_an_input_has_from_one_to_fifty_thousand_lines(
    sdk: openai.OpenAI, lines: list[str], code: str, number: int | None
) -> None:
    batch = ended(sdk, begin(sdk, lines))

    assert batch.errors is not None
    assert [(each.code, each.line) for each in batch.errors.data or []] == [(code, number)]


def test_a_batch_embeds_a_bounded_number_of_texts(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    url = "/v1/embeddings"
    lines = [line(number, url, {"model": MODEL, "input": ["a"] * 2000}) for number in range(26)]

    batch = ended(sdk, begin(sdk, lines, endpoint=url))

    assert batch.errors is not None
    assert [(each.code, each.line) for each in batch.errors.data or []] == [("too_many_inputs", 26)]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input_file_id": "file-000000000000000000000000"}, 404, "input_file_id"),
        ({"input_file_id": "../../etc/passwd"}, 404, "input_file_id"),
        ({"endpoint": "/v1/models"}, 400, "endpoint"),
        ({"completion_window": "soon"}, 400, "completion_window"),
        ({"completion_window": "99999999d"}, 400, "completion_window"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"extra_body": {"colour": "red"}}, 400, "colour"),
    ],
    ids=["no-file", "path", "endpoint", "window", "long-window", "metadata", "unknown"],
)
def test_a_batch_that_cannot_be_is_refused_by_field(
    sdk: openai.OpenAI, fields: dict[str, object], status: int, param: str
) -> None:
    given = {"input_file_id": upload(sdk, [chat_line(1)]), "endpoint": CHAT, "completion_window": "24h", **fields}

    with pytest.raises(openai.APIStatusError) as caught:
        sdk.batches.create(**given)  # type: ignore[arg-type]  # wrong on purpose

    assert (caught.value.status_code, caught.value.param) == (status, param)
    assert sdk.batches.list().data == []


def test_a_cancelled_batch_finishes_what_runs_and_gives_up_the_rest(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    with Patient(worker, holds=["held"]) as patient:
        batch = begin(sdk, [chat_line(0, "a"), chat_line(1, "held"), *(chat_line(n, "held") for n in range(2, 40))])
        wait_until(lambda: len(patient.asked) >= 3)
        asked = sdk.batches.cancel(batch.id)
        wait_until(lambda: sdk.batches.retrieve(batch.id).cancelling_at)
        running = wait_until(lambda: all_running(worker))
        for job_id in running:
            worker.emit(job_id, token("late"), done())
        batch = ended(sdk, batch)

    outputs, errors = records(sdk, batch.output_file_id), records(sdk, batch.error_file_id)
    assert (asked.status, batch.status) == ("cancelling", "cancelled")
    assert set(texts(outputs).values()) == {"<a>", "late"}
    assert len(outputs) == 1 + len(running)
    assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}  # type: ignore[index]  # it is JSON
    assert len(outputs) + len(errors) == 40
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 40, "completed": len(outputs), "failed": 0}
    with pytest.raises(openai.ConflictError, match="not ended"):
        sdk.batches.cancel(batch.id)


def test_a_batch_ends_with_its_window(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    def expired() -> Batch | None:
        for job_id in list(worker.fences):
            if worker.redis.hmget(worker.keys.job(job_id), "state", "cancel") == ["running", "1"]:
                worker.emit(job_id, Cancelled())  # as a worker does at its next sweep
        found = sdk.batches.retrieve(batch.id)
        return found if found.status == "expired" else None

    with Patient(worker, holds=["held"]):
        lines = [chat_line(0, "a"), *(chat_line(number, "held") for number in range(1, 8))]
        batch = begin(sdk, lines, completion_window="3s")
        found = wait_until(expired)

    assert (found.expires_at, found.expired_at) == (batch.created_at + 3, found.expired_at)
    assert found.expired_at is not None
    assert found.expired_at >= batch.created_at + 3
    assert texts(records(sdk, found.output_file_id)) == {"c0": "<a>"}
    codes = [each["error"]["code"] for each in records(sdk, found.error_file_id)]  # type: ignore[index]  # it is JSON
    assert codes == ["batch_expired"] * 7


def test_jobs_wait_behind_what_people_wait_for(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    begin(sdk, [chat_line(1)])
    job_id = wait_until(lambda: next(iter(worker.redis.zrange(worker.keys.active, 0, -1)), None))

    assert int(worker.redis.hget(worker.keys.job(job_id), "class") or 0) == Priority.LOW.rank


def test_the_input_may_be_deleted_while_its_batch_runs(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    file_id = upload(sdk, [chat_line(number) for number in range(20)])

    batch = sdk.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    sdk.files.delete(file_id)
    with Patient(worker):
        batch = ended(sdk, batch)

    assert (batch.status, len(records(sdk, batch.output_file_id))) == ("completed", 20)


def test_a_request_that_is_sent_again_makes_no_second_batch(sdk: openai.OpenAI) -> None:
    file_id = upload(sdk, [chat_line(1)])
    asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    key, retry = {"Idempotency-Key": "one"}, {"x-stainless-retry-count": "1"}

    first = sdk.batches.create(**asked, extra_headers=key)  # type: ignore[arg-type]  # it is so
    again = sdk.batches.create(**asked, extra_headers=key)  # type: ignore[arg-type]  # as above
    other = sdk.batches.create(**asked)  # type: ignore[arg-type]  # as above
    retried = sdk.batches.create(**asked, extra_headers=retry)  # type: ignore[arg-type]  # as above
    with pytest.raises(openai.UnprocessableEntityError, match="another batch"):
        sdk.batches.create(**asked, metadata={"a": "b"}, extra_headers=key)  # type: ignore[arg-type]  # as above

    assert (again.id, retried.id) == (first.id, other.id)
    assert [batch.id for batch in sdk.batches.list()] == [other.id, first.id]


def test_a_key_pays_for_its_batch_and_sees_no_other(
    guarded: RunningGateway, answering: AnsweringWorker, new_key: MakeKey, connection: Connection
) -> None:
    ada_key = new_key("ada", requests_per_minute=3)
    with guarded.client(ada_key) as ada, guarded.client(new_key("eve")) as eve:
        batch = ended(ada, begin(ada, [chat_line(number) for number in range(12)]))
        key_id = ada_key.split("-")[2]
        use = wait_until(
            lambda: use if (use := connection.run(read_use(connection.keys, [key_id]))[0]).prompt_tokens else None
        )
        wait_until(lambda: connection.run(read_use(connection.keys, [key_id]))[0].completion_tokens == 36)
        use = connection.run(read_use(connection.keys, [key_id]))[0]

        assert eve.batches.list().data == []
        for attempt in (eve.batches.retrieve, eve.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                attempt(batch.id)
        with pytest.raises(openai.NotFoundError):
            eve.files.content(batch.output_file_id or "")
        with pytest.raises(openai.NotFoundError):
            eve.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")

    assert (use.requests, use.prompt_tokens, use.completion_tokens, use.tokens_today) == (12, 36, 36, 72)


def test_what_a_key_may_not_is_refused(guarded: RunningGateway, answering: AnsweringWorker, new_key: MakeKey) -> None:
    with (
        guarded.client(new_key("a", endpoints=("batches",))) as no_chat,
        guarded.client(new_key("b", models=("other/model",))) as no_model,
        guarded.client(new_key("c", tokens_per_day=100)) as poor,
    ):
        with pytest.raises(openai.PermissionDeniedError, match="may not call chat"):
            begin(no_chat, [chat_line(1)])
        failed = [ended(sdk, begin(sdk, [chat_line(1, max_tokens=500)])) for sdk in (no_model, poor)]

    assert [batch.status for batch in failed] == ["failed", "failed"]
    codes = [(batch.errors.data or [])[0].code for batch in failed if batch.errors is not None]
    assert codes == ["model_not_allowed", "insufficient_quota"]


def test_a_batch_waits_where_its_keys_tokens_are_used_up(
    guarded: RunningGateway, worker: ActingWorker, new_key: MakeKey
) -> None:
    with guarded.client(new_key("ada", tokens_per_day=100)) as ada, Patient(worker, holds=["p0"]) as patient:
        batch = begin(ada, [chat_line(number, max_tokens=60) for number in range(2)])
        wait_until(lambda: patient.asked)
        (job_id,) = worker.fences
        assert worker.redis.zcard(worker.keys.active) == 1
        worker.emit(job_id, token("x"), done())  # brings 4 tokens, so that 96 are left
        batch = ended(ada, batch)

    assert batch.status == "completed"
    assert patient.asked == ["p0", "p1"]


def test_a_revoked_key_ends_its_batch(
    guarded: RunningGateway, worker: ActingWorker, new_key: MakeKey, connection: Connection
) -> None:
    ada_key = new_key("ada")
    with guarded.client(ada_key) as ada, Patient(worker, holds=["held"]) as patient:
        batch = begin(ada, [chat_line(0, "a"), *(chat_line(number, "held") for number in range(1, 30))])
        wait_until(lambda: len(patient.asked) >= 2)
        key_id = ada_key.split("-")[2]
        connection.run(revoke_key(connection.keys, key_id))
        store = BatchStore(guarded.settings.files_root)

        def failed() -> BatchRecord | None:
            for job_id in list(worker.fences):
                if worker.redis.hmget(worker.keys.job(job_id), "state", "cancel") == ["running", "1"]:
                    worker.emit(job_id, Cancelled())
            found = store.read(key_id, batch.id)
            return found if found is not None and found.status == "failed" else None

        record = wait_until(failed)

    assert [fault.code for fault in record.errors] == ["invalid_api_key"]
    assert (record.tally.completed, record.tally.given_up) == (1, 29)
