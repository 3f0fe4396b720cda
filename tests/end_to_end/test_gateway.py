"""The OpenAI API before a real worker with a tiny model: the same answer as the library's, streamed and resumed."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from tests.gateway.running_gateway import RunningGateway

CHAT = [{"role": "user", "content": "The river runs"}]
SAMPLED = {"temperature": 0.8, "seed": 11, "max_tokens": 24}


@pytest.fixture
def sdk(session_server: EmbeddedServer) -> Iterator[openai.OpenAI]:
    with RunningGateway(session_server.url) as gateway, gateway.client() as sdk:
        yield sdk


def test_a_chat_is_the_librarys_answer_whole_and_streamed(sdk: openai.OpenAI, client: Client, solo: str) -> None:
    expected = client.generate(messages=CHAT, model=solo, timeout_s=60, **SAMPLED)

    whole = sdk.chat.completions.create(model=solo, messages=CHAT, **SAMPLED)
    chunks = list(sdk.chat.completions.create(model=solo, messages=CHAT, stream=True, **SAMPLED))

    assert whole.choices[0].message.content == expected.text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason
    assert whole.usage.prompt_tokens == expected.usage.prompt_tokens
    assert whole.usage.completion_tokens == expected.usage.completion_tokens


def test_a_response_is_resumed_while_its_model_writes(sdk: openai.OpenAI, solo: str) -> None:
    made = sdk.responses.create(
        model=solo,
        input="The river runs",
        max_output_tokens=200,
        background=True,
        extra_body={"ignore_eos": True, "seed": 3},
    )
    first = []
    for event in sdk.responses.retrieve(made.id, stream=True):
        first.append(event)
        if len(first) == 20:
            break

    rest = list(sdk.responses.retrieve(made.id, stream=True, starting_after=first[-1].sequence_number))

    numbers = [event.sequence_number for event in [*first, *rest]]
    assert numbers == list(range(len(numbers)))
    assert rest[-1].response.output_text == "".join(
        event.delta for event in [*first, *rest] if event.type == "response.output_text.delta"
    )
    assert rest[-1].response.usage.output_tokens == 200


def test_logprobs_spell_their_tokens(sdk: openai.OpenAI, solo: str) -> None:
    answer = sdk.chat.completions.create(
        model=solo,
        messages=CHAT,
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )

    (choice,) = answer.choices
    positions = choice.logprobs.content
    assert len(positions) == 8
    assert all(len(position.top_logprobs) == 3 for position in positions)
    assert all(position.top_logprobs[0].token == position.token for position in positions), "greedy takes the best"
    assert not any(position.token.startswith("token_id:") for position in positions)


def test_a_prompt_longer_than_the_context_is_the_callers_mistake(sdk: openai.OpenAI, solo: str) -> None:
    for is_stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.chat.completions.create(
                model=solo, messages=[{"role": "user", "content": "word " * 5000}], stream=is_stream
            )
        assert caught.value.code == "context_length_exceeded"
