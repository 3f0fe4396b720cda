"""A request that is sent again neither computes nor bills twice."""

from __future__ import annotations

import openai
import pytest

from lamella.messages import Done
from tests.client.acting_worker import MODEL, ActingWorker
from tests.gateway.conftest import MakeKey
from tests.gateway.running_gateway import AnsweringWorker, RunningGateway

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
AGAIN = {"x-stainless-retry-count": "1"}
FIRST = {"x-stainless-retry-count": "0"}


def jobs(worker: ActingWorker) -> int:
    return worker.redis.zcard(worker.keys.jobs)


def test_an_idempotency_key_stands_for_one_answer(
    sdk: openai.OpenAI, answering: AnsweringWorker, worker: ActingWorker
) -> None:
    key = {"Idempotency-Key": "question 1"}
    first = sdk.chat.completions.create(**CHAT, n=2, extra_headers=key)
    again = sdk.chat.completions.create(**CHAT, n=2, extra_headers=key)
    streamed = list(sdk.chat.completions.create(**CHAT, n=2, stream=True, extra_headers=key))

    assert again.id == first.id == streamed[0].id
    assert jobs(worker) == 2
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        sdk.chat.completions.create(**CHAT, n=2, temperature=0.5, extra_headers=key)
    assert caught.value.code == "idempotency_conflict"


def test_an_idempotency_key_is_its_users_alone(
    guarded: RunningGateway, answering: AnsweringWorker, new_key: MakeKey
) -> None:
    header = {"Idempotency-Key": "question 1"}
    with guarded.client(new_key("ada")) as ada, guarded.client(new_key("eve")) as eve:
        first = ada.chat.completions.create(**CHAT, extra_headers=header)
        other = eve.chat.completions.create(**CHAT, extra_headers=header)

    assert other.id != first.id


def test_the_sdks_own_retry_goes_on_with_the_first_job(
    guarded: RunningGateway, answering: AnsweringWorker, worker: ActingWorker, new_key: MakeKey
) -> None:
    with guarded.client(new_key("ada", tokens_per_day=2000)) as sdk:
        first = sdk.chat.completions.create(**CHAT, extra_headers=FIRST)
        again = sdk.chat.completions.create(**CHAT, extra_headers=AGAIN)
        other = sdk.chat.completions.create(**CHAT, temperature=0.5, extra_headers=AGAIN)

    assert again.id == first.id
    assert other.id != first.id
    assert jobs(worker) == 2


def test_two_equal_requests_that_are_no_retries_are_two(
    sdk: openai.OpenAI, answering: AnsweringWorker, worker: ActingWorker
) -> None:
    first = sdk.chat.completions.create(**CHAT)
    second = sdk.chat.completions.create(**CHAT)

    assert first.id != second.id
    assert jobs(worker) == 2


def test_a_retry_of_what_was_cancelled_begins_anew(
    sdk: openai.OpenAI, answering: AnsweringWorker, worker: ActingWorker
) -> None:
    first = sdk.chat.completions.create(**CHAT, extra_headers=FIRST)
    worker.redis.hset(worker.keys.job(first.id.removeprefix("chatcmpl-")), "state", "cancelled")

    again = sdk.chat.completions.create(**CHAT, extra_headers=AGAIN)

    assert again.id != first.id
    assert isinstance(answering.answer("")[-1], Done)


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_an_idempotency_key_that_cannot_be_one_is_refused(
    sdk: openai.OpenAI, answering: AnsweringWorker, key: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(**CHAT, extra_headers={"Idempotency-Key": key})

    assert caught.value.param == "Idempotency-Key"
