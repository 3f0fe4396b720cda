"""Responses: whole, streamed, in the background, resumed from the durable stream, gone on from, cancelled, deleted."""

from __future__ import annotations

import openai
import pytest

from lamella.messages import decode_request
from tests.client.acting_worker import MODEL, ActingWorker, done, failed, token
from tests.gateway.conftest import MakeKey
from tests.gateway.running_gateway import AnsweringWorker, RunningGateway, on_next_job
from tests.waiting import wait_until

STREAM = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def job_of(response_id: str) -> str:
    return response_id.removeprefix("resp_")


def test_a_response_comes_whole(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    made = sdk.responses.create(model=MODEL, input="Hi", metadata={"topic": "greeting"}, max_output_tokens=9)

    assert made.status == "completed"
    assert made.output_text == "Hello there"
    assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.total_tokens) == (3, 3, 6)
    assert made.metadata == {"topic": "greeting"}
    assert made.max_output_tokens == 9
    assert sdk.responses.retrieve(made.id).to_dict() == made.to_dict()


def test_a_stream_has_the_events_of_openai_numbered(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    events = list(sdk.responses.create(model=MODEL, input="Hi", stream=True))

    assert [event.type for event in events] == STREAM
    assert [event.sequence_number for event in events] == list(range(len(STREAM)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello there"
    assert events[-1].response.output_text == "Hello there"
    assert events[-1].response.usage.output_tokens == 3


def test_the_sdks_stream_helper_gathers_the_text(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    with sdk.responses.stream(model=MODEL, input="Hi") as stream:
        final = stream.get_final_response()

    assert final.output_text == "Hello there"


def test_a_background_response_is_resumed_after_any_event(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    made = sdk.responses.create(model=MODEL, input="Hi", background=True)
    assert made.status == "queued"
    job_id = job_of(made.id)
    worker.claim(job_id)
    worker.emit(job_id, token("Par"))
    assert sdk.responses.retrieve(made.id).status == "in_progress"
    worker.emit(job_id, token("is"))
    worker.emit(job_id, done(2))

    whole = list(sdk.responses.retrieve(made.id, stream=True))

    assert sdk.responses.retrieve(made.id).output_text == "Paris"
    assert [event.type for event in whole][:3] == ["response.created", "response.queued", "response.in_progress"]
    for after in range(len(whole)):
        rest = list(sdk.responses.retrieve(made.id, stream=True, starting_after=after))
        assert [event.to_dict() for event in rest] == [event.to_dict() for event in whole[after + 1 :]]


def test_a_stream_that_was_cut_goes_on_at_another_gateway(
    gateway: RunningGateway, guarded: RunningGateway, worker: ActingWorker, new_key: MakeKey
) -> None:
    key = new_key("ada")
    with RunningGateway(gateway.settings.redis_url or "", requires_key=True) as doomed, doomed.client(key) as sdk:
        stream = sdk.responses.create(model=MODEL, input="Hi", stream=True, background=True)
        first = next(stream)
        job_id = job_of(first.response.id)
        worker.claim(job_id)
        worker.emit(job_id, token("Par"))
        seen = [first]
        while seen[-1].type != "response.output_text.delta":
            seen.append(next(stream))
        stream.close()

    worker.emit(job_id, token("is"))
    worker.emit(job_id, done(2))
    with guarded.client(key) as sdk:
        after = seen[-1].sequence_number
        rest = list(sdk.responses.retrieve(first.response.id, stream=True, starting_after=after))

    numbers = [event.sequence_number for event in [*seen, *rest]]
    assert numbers == list(range(len(numbers)))
    assert rest[0].delta == "is"
    assert rest[-1].response.output_text == "Paris"


async def test_the_asynchronous_sdk_streams_too(gateway: RunningGateway, answering: AnsweringWorker) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=40) as sdk:
        stream = await sdk.responses.create(model=MODEL, input="Hi", stream=True)
        assert [event.type async for event in stream] == STREAM
        chunks = await sdk.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == "Hello there"


def test_a_response_goes_on_from_an_earlier_one(
    sdk: openai.OpenAI, answering: AnsweringWorker, worker: ActingWorker
) -> None:
    first = sdk.responses.create(model=MODEL, input="Hi", instructions="Be brief.")
    second = sdk.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": [{"type": "input_text", "text": "And?"}]}],
        instructions="Be kind.",
        previous_response_id=first.id,
    )

    request = decode_request(worker.redis.hget(worker.keys.job(job_of(second.id)), "request") or "")
    assert [(message.role, message.content) for message in request.messages or ()] == [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello there"),
        ("user", "And?"),
    ]
    assert second.previous_response_id == first.id


def test_output_of_one_response_is_input_of_the_next(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    first = sdk.responses.create(model=MODEL, input="Hi")

    turns = [item.model_dump() for item in first.output]
    second = sdk.responses.create(model=MODEL, input=[*turns, {"role": "user", "content": "And?"}])

    assert second.output_text == "Hello there"


def test_what_was_not_stored_cannot_be_fetched_or_gone_on_from(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    made = sdk.responses.create(model=MODEL, input="Hi", store=False)

    with pytest.raises(openai.NotFoundError, match="store: false"):
        sdk.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.responses.create(model=MODEL, input="And?", previous_response_id=made.id)
    assert caught.value.param == "previous_response_id"


def test_cancel_ends_a_background_response(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    made = sdk.responses.create(model=MODEL, input="Hi", background=True)

    cancelled = sdk.responses.cancel(made.id)

    assert cancelled.status == "cancelled"
    assert sdk.responses.retrieve(made.id).status == "cancelled"
    events = list(sdk.responses.retrieve(made.id, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.status == "cancelled"


def test_only_background_responses_are_cancelled_by_name(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    made = sdk.responses.create(model=MODEL, input="Hi")

    with pytest.raises(openai.BadRequestError, match="background"):
        sdk.responses.cancel(made.id)


def test_a_deleted_response_is_gone_with_its_job(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    made = sdk.responses.create(model=MODEL, input="Hi")

    sdk.responses.delete(made.id)

    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(made.id)
    server, keys = answering.acting.redis, answering.acting.keys
    assert server.exists(keys.job(job_of(made.id)), keys.stream(job_of(made.id))) == 0


def test_a_deleted_response_that_runs_goes_when_it_has_ended(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    made = sdk.responses.create(model=MODEL, input="Hi", background=True)
    job_id = job_of(made.id)
    worker.claim(job_id)
    worker.emit(job_id, token("Par"))

    sdk.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(made.id)
    assert worker.emit(job_id, token("is")).cancel_requested
    worker.emit(job_id, done(2))

    wait_until(lambda: worker.redis.exists(worker.keys.job(job_id)) == 0)


def test_a_failed_job_is_a_failed_response(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    thread = on_next_job(worker, lambda job_id: worker.emit(job_id, failed()))
    *_, last = sdk.responses.create(model=MODEL, input="Hi", stream=True)
    thread.join(40)

    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error.message.startswith("prompt_too_long: the prompt has 9 tokens")
    assert sdk.responses.retrieve(last.response.id).status == "failed"


def test_a_response_that_ran_into_its_limit_is_incomplete(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    answering.answer = lambda prompt: (token("Par"), done(1).model_copy(update={"finish_reason": "length"}))

    made = sdk.responses.create(model=MODEL, input="Hi", max_output_tokens=1)

    assert made.status == "incomplete"
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.output_text == "Par"


def test_one_user_never_sees_anothers_responses(
    guarded: RunningGateway, answering: AnsweringWorker, new_key: MakeKey
) -> None:
    with guarded.client(new_key("ada")) as ada, guarded.client(new_key("eve")) as eve:
        made = ada.responses.create(model=MODEL, input="Hi", background=True)

        for forbidden in (
            lambda: eve.responses.retrieve(made.id),
            lambda: eve.responses.cancel(made.id),
            lambda: eve.responses.delete(made.id),
            lambda: eve.responses.retrieve(made.id, stream=True),
            lambda: eve.responses.create(model=MODEL, input="Hi", previous_response_id=made.id),
        ):
            with pytest.raises(openai.NotFoundError):
                forbidden()
        assert ada.responses.retrieve(made.id).id == made.id


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"stream": "yes"}, "stream"),
        ({"starting_after": "1"}, "starting_after"),
        ({"stream": "true", "starting_after": "-1"}, "starting_after"),
        ({"stream": "true", "starting_after": "9" * 40}, "starting_after"),
        ({"include": "everything"}, "include"),
        ({"nonsense": "1"}, "nonsense"),
    ],
)
def test_a_query_that_cannot_be_is_named(
    sdk: openai.OpenAI, answering: AnsweringWorker, query: dict[str, str], param: str
) -> None:
    made = sdk.responses.create(model=MODEL, input="Hi")

    with pytest.raises(openai.BadRequestError) as caught:
        sdk.responses.retrieve(made.id, extra_query=query)

    assert caught.value.param == param
