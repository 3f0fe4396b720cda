"""Chat completions, with OpenAI's own SDK as the client."""

from __future__ import annotations

import json

import openai
import pytest

from lamella.messages import Done, TokenEvent, TokenLogprob, Usage, decode_request
from tests.client.acting_worker import MODEL, ActingWorker, failed, token
from tests.gateway.running_gateway import AnsweringWorker, RunningGateway, on_next_job

USER = [{"role": "user", "content": "Hi"}]


def sent(worker: ActingWorker) -> list:
    """The requests of all jobs, oldest first."""
    ids = worker.redis.zrange(worker.keys.jobs, 0, -1)
    return [decode_request(worker.redis.hget(worker.keys.job(job_id), "request")) for job_id in ids]


def test_a_chat_is_answered_whole(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    answer = sdk.chat.completions.create(model=MODEL, messages=USER)

    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.choices[0].message.content == "Hello there"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 3, 6)


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    chunks = list(sdk.chat.completions.create(model=MODEL, messages=USER, stream=True))

    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Hel", "lo ", "there", None]
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None, None, None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "stop"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_where_it_is_asked_for(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    options = {"include_usage": True}
    *chunks, last = sdk.chat.completions.create(model=MODEL, messages=USER, stream=True, stream_options=options)

    assert last.choices == []
    assert last.usage.total_tokens == 6
    assert all(chunk.usage is None for chunk in chunks)


def test_n_choices_are_n_jobs_with_seeds_of_their_own(
    sdk: openai.OpenAI, answering: AnsweringWorker, worker: ActingWorker
) -> None:
    first = sdk.chat.completions.create(model=MODEL, messages=USER, n=3, seed=7)
    sdk.chat.completions.create(model=MODEL, messages=USER, n=3, seed=7)

    seeds = [request.sampling.seed for request in sent(worker)]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.prompt_tokens == 3
    assert first.usage.completion_tokens == 9
    assert len(set(seeds)) == 3
    assert sorted(seeds[:3]) == sorted(seeds[3:])
    assert 7 in seeds


def test_choices_of_a_stream_carry_their_index(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    texts = {0: "", 1: ""}
    reasons = {}

    for chunk in sdk.chat.completions.create(model=MODEL, messages=USER, stream=True, n=2):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason

    assert texts == {0: "Hello there", 1: "Hello there"}
    assert reasons == {0: "stop", 1: "stop"}


def test_sampling_reaches_the_job_as_it_was_asked_for(
    sdk: openai.OpenAI, answering: AnsweringWorker, worker: ActingWorker
) -> None:
    sdk.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]},
        ],
        temperature=0.5,
        top_p=0.9,
        seed=-5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        max_completion_tokens=17,
        stop=["END", "\n\n"],
        logprobs=True,
        top_logprobs=4,
        logit_bias={"50": -100, "7": 2.5},
        extra_body={"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "stop_token_ids": [2], "ignore_eos": True},
    )

    (request,) = sent(worker)
    assert [(message.role, message.content) for message in request.messages] == [
        ("system", "Be brief."),
        ("user", "Hi there"),
    ]
    assert request.sampling.model_dump() == {
        "max_tokens": 17,
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "seed": 2**63 - 5,
        "stop": ("END", "\n\n"),
        "stop_token_ids": (2,),
        "ignore_eos": True,
        "logprobs": 4,
        "logit_bias": ((7, 2.5), (50, -100)),
    }


def test_what_is_left_out_is_as_with_openai(
    sdk: openai.OpenAI, answering: AnsweringWorker, worker: ActingWorker
) -> None:
    sdk.chat.completions.create(model=MODEL, messages=USER)

    (request,) = sent(worker)
    assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)
    assert request.sampling.max_tokens == 512, "the model's context"


def test_a_clients_own_answer_can_be_sent_back(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    first = sdk.chat.completions.create(model=MODEL, messages=USER)

    turns = [*USER, first.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
    second = sdk.chat.completions.create(model=MODEL, messages=turns)

    assert second.choices[0].message.content == "Hello there"


def test_logprobs_have_openais_shape(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    told = TokenLogprob(token_id=5, logprob=-0.25, top=((5, -0.25), (9, -2.0)), text="Hé", top_texts=("Hé", "Yo"))
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    answering.answer = lambda prompt: (
        TokenEvent(token_ids=(5,), text="Hé", logprobs=(told,)),
        Done(finish_reason="length", usage=usage),
    )

    whole = sdk.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=2)
    chunks = list(sdk.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=2, stream=True))

    (position,) = whole.choices[0].logprobs.content
    assert (position.token, position.logprob, bytes(position.bytes)) == ("Hé", -0.25, "Hé".encode())
    assert [(top.token, top.logprob) for top in position.top_logprobs] == [("Hé", -0.25), ("Yo", -2.0)]
    assert chunks[1].choices[0].logprobs.content == [position]
    assert whole.choices[0].finish_reason == "length"


def test_a_failure_before_the_first_token_has_its_status(gateway: RunningGateway, worker: ActingWorker) -> None:
    with gateway.client() as sdk:
        for is_stream in (False, True):
            thread = on_next_job(worker, lambda job_id: worker.emit(job_id, failed()))
            with pytest.raises(openai.BadRequestError) as caught:
                sdk.chat.completions.create(model=MODEL, messages=USER, stream=is_stream)
            thread.join(40)

            assert caught.value.code == "context_length_exceeded"
            assert caught.value.param == "messages"
            assert "the prompt has 9 tokens" in caught.value.message


def test_a_failure_in_the_middle_of_a_stream_is_an_error_of_the_stream(
    gateway: RunningGateway, worker: ActingWorker
) -> None:
    with gateway.client() as sdk:
        thread = on_next_job(worker, lambda job_id: worker.emit(job_id, token("Par")))
        stream = sdk.chat.completions.create(model=MODEL, messages=USER, stream=True)
        seen = [next(stream).choices[0].delta.content, next(stream).choices[0].delta.content]
        thread.join(40)
        (job_id,) = worker.fences
        worker.emit(job_id, failed())

        with pytest.raises(openai.APIError, match="the prompt has 9 tokens"):
            next(stream)
    assert seen == ["", "Par"]


def test_the_raw_stream_is_server_sent_events(gateway: RunningGateway, answering: AnsweringWorker) -> None:
    with gateway.client() as sdk:
        response = sdk.chat.completions.with_raw_response.create(model=MODEL, messages=USER, stream=True)
        lines = [line for line in response.http_response.iter_lines() if line]

    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert all("choices" in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_a_format_reaches_the_job_from_chat_and_from_responses(
    sdk: openai.OpenAI, answering: AnsweringWorker, worker: ActingWorker
) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
    named = {"name": "thing", "schema": schema, "strict": True}

    sdk.chat.completions.create(
        model=MODEL, messages=USER, response_format={"type": "json_schema", "json_schema": named}
    )
    sdk.chat.completions.create(model=MODEL, messages=USER, response_format={"type": "json_object"})
    made = sdk.responses.create(model=MODEL, input="Hi", text={"format": {"type": "json_schema", **named}})

    chat, free, response = (request.response_format for request in sent(worker))
    assert chat == response
    assert json.loads(chat.json_schema) == schema
    assert list(json.loads(chat.json_schema)["properties"]) == ["b", "a"]
    assert free.type == "json_object"
    assert made.text.format.name == "thing"
