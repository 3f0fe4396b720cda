"""Tools over HTTP: described, called, answered, forced, in chats and in responses, whole and streamed."""

from __future__ import annotations

import json

import openai
import pytest

from lamella.messages import Done, TokenEvent, Usage
from tests.client.acting_worker import MODEL, ActingWorker
from tests.gateway.running_gateway import AnsweringWorker, Events
from tests.gateway.test_chat import sent

USER = [{"role": "user", "content": "Weather in Paris and Rome?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Tells the weather", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
FLAT = [{"type": "function", "strict": None, **FUNCTION}]
ASKED = [{"city": "Paris"}, {"city": "Rome"}]


def calling(text: str, *, reason: str = "stop", size: int = 3) -> Events:
    """A worker's events for an answer that comes in small pieces."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    usage = Usage(prompt_tokens=5, completion_tokens=len(pieces))
    first, *rest = pieces
    return (
        TokenEvent(token_ids=(1,), text=first, tool_format="hermes"),
        *(TokenEvent(token_ids=(2,), text=piece) for piece in rest),
        Done(finish_reason=reason, usage=usage),
    )


def hermes(*calls: dict[str, object]) -> str:
    return "\n".join(f"<tool_call>{json.dumps({'name': 'weather', 'arguments': each})}</tool_call>" for each in calls)


@pytest.fixture
def tool_worker(answering: AnsweringWorker) -> AnsweringWorker:
    """A worker whose answers are a sentence and two calls."""
    answering.answer = lambda prompt: calling("I look. " + hermes(*ASKED))
    return answering


@pytest.mark.parametrize("is_stream", [False, True])
def test_calls_come_in_openais_shapes(sdk: openai.OpenAI, tool_worker: AnsweringWorker, is_stream: bool) -> None:
    if is_stream:
        with sdk.chat.completions.stream(model=MODEL, messages=USER, tools=TOOLS) as stream:
            choice = stream.get_final_completion().choices[0]
    else:
        choice = sdk.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS).choices[0]

    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look. "
    assert [call.function.name for call in choice.message.tool_calls] == ["weather", "weather"]
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == ASKED
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_an_answer_of_calls_alone_has_no_content(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    answering.answer = lambda prompt: calling(hermes(ASKED[0], {}))

    message = sdk.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS).choices[0].message

    assert message.content is None
    assert [call.function.arguments for call in message.tool_calls] == ['{"city": "Paris"}', "{}"]


def test_first_chunk_of_a_call_has_its_id_and_the_others_only_arguments(
    sdk: openai.OpenAI, tool_worker: AnsweringWorker
) -> None:
    deltas = [
        call
        for chunk in sdk.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, stream=True)
        for call in chunk.choices[0].delta.tool_calls or ()
    ]

    for index in (0, 1):
        first, *rest = [call for call in deltas if call.index == index]
        assert (first.type, first.function.name, bool(first.id)) == ("function", "weather", True)
        assert all(call.id is None and call.function.name is None for call in rest)
        assert len(rest) > 1, "arguments come as they are written"
        assert json.loads("".join(call.function.arguments for call in (first, *rest))) == ASKED[index]


def test_without_parallel_calls_there_is_one(sdk: openai.OpenAI, tool_worker: AnsweringWorker) -> None:
    options = {"model": MODEL, "parallel_tool_calls": False}

    whole = sdk.chat.completions.create(messages=USER, tools=TOOLS, **options).choices[0].message
    with sdk.chat.completions.stream(messages=USER, tools=TOOLS, **options) as stream:
        streamed = stream.get_final_completion().choices[0].message
    made = sdk.responses.create(input="Hi", tools=FLAT, **options)

    assert [json.loads(call.function.arguments) for call in whole.tool_calls] == ASKED[:1]
    assert [json.loads(call.function.arguments) for call in streamed.tool_calls] == ASKED[:1]
    assert [item.type for item in made.output] == ["message", "function_call"]
    assert made.parallel_tool_calls is False


def test_a_call_that_is_cut_ends_for_its_length(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    answering.answer = lambda prompt: calling(hermes(ASKED[0])[:-20], reason="length")

    choice = sdk.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS).choices[0]
    made = sdk.responses.create(model=MODEL, input="Hi", tools=FLAT)

    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments.startswith('{"city"')
    assert (made.status, made.output[0].status) == ("incomplete", "incomplete")


def test_what_looks_like_a_call_without_tools_is_text(sdk: openai.OpenAI, answering: AnsweringWorker) -> None:
    text = hermes(ASKED[0])
    answering.answer = lambda prompt: [
        each.model_copy(update={"tool_format": None}) if isinstance(each, TokenEvent) else each
        for each in calling(text)
    ]

    assert sdk.chat.completions.create(model=MODEL, messages=USER).choices[0].message.content == text


def test_tools_calls_and_their_outputs_reach_the_job(
    sdk: openai.OpenAI, tool_worker: AnsweringWorker, worker: ActingWorker
) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    message = sdk.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, tool_choice=named).choices[0].message
    outputs = [{"role": "tool", "tool_call_id": call.id, "content": "Sunny"} for call in message.tool_calls]

    sdk.chat.completions.create(model=MODEL, messages=[*USER, message, *outputs], tools=TOOLS, tool_choice="required")

    first, second = sent(worker)
    assert json.loads(first.tools[0].parameters) == SCHEMA
    assert (first.tool_choice.name, second.tool_choice) == ("weather", "required")
    assert [turn.role for turn in second.messages] == ["user", "assistant", "tool", "tool"]
    assert [json.loads(call.function.arguments) for call in second.messages[1].tool_calls] == ASKED
    assert [turn.tool_call_id for turn in second.messages[2:]] == [call.id for call in message.tool_calls]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": [{"type": "web_search"}]}, "Only function tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern"),
        ({"tools": TOOLS * 2}, "same name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "not among the tools"),
        ({"tool_choice": "required"}, "without tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "exclude each other"),
        ({"tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}]}, "strict cannot be promised"),
        ({"messages": [{"role": "tool", "content": "Sunny"}]}, "tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "content is missing"),
    ],
    ids=str,
)
def test_tools_that_cannot_be_are_refused(
    sdk: openai.OpenAI, worker: ActingWorker, fields: dict[str, object], said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        sdk.chat.completions.create(**{"model": MODEL, "messages": USER, **fields})

    assert sent(worker) == []


def test_strict_tools_are_taken_where_a_call_is_forced(
    sdk: openai.OpenAI, tool_worker: AnsweringWorker, worker: ActingWorker
) -> None:
    tools = [{"type": "function", "function": {**FUNCTION, "strict": True}}]

    sdk.chat.completions.create(model=MODEL, messages=USER, tools=tools, tool_choice="required")

    assert sent(worker)[0].tool_choice == "required"


def test_a_response_has_an_item_for_each_call(sdk: openai.OpenAI, tool_worker: AnsweringWorker) -> None:
    made = sdk.responses.create(model=MODEL, input="Hi", tools=FLAT, tool_choice="auto")

    text, *calls = made.output
    assert made.status == "completed"
    assert (text.type, made.output_text) == ("message", "I look. ")
    assert [(item.type, item.name, item.status) for item in calls] == [("function_call", "weather", "completed")] * 2
    assert [json.loads(item.arguments) for item in calls] == ASKED
    assert made.tools[0].name == "weather"
    assert sdk.responses.retrieve(made.id).to_dict() == made.to_dict()


def test_a_responses_calls_are_streamed_and_can_be_resumed(sdk: openai.OpenAI, tool_worker: AnsweringWorker) -> None:
    events = list(sdk.responses.create(model=MODEL, input="Hi", tools=FLAT, stream=True))

    last = events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    opened = [event.item.id for event in events if event.type == "response.output_item.added"]
    closed = [event.item for event in events if event.type == "response.output_item.done"]
    assert opened == [item.id for item in last.output]
    assert closed == last.output
    for index in (1, 2):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        told = "".join(event.delta for event in mine if event.type == "response.function_call_arguments.delta")
        (done,) = [event for event in mine if event.type == "response.function_call_arguments.done"]
        assert done.arguments == told == last.output[index].arguments
        assert {event.item_id for event in mine if hasattr(event, "item_id")} == {last.output[index].id}
    rest = list(sdk.responses.retrieve(last.id, stream=True, starting_after=9))
    assert [event.to_dict() for event in rest] == [event.to_dict() for event in events[10:]]


def test_the_sdks_helper_gathers_a_responses_calls(sdk: openai.OpenAI, tool_worker: AnsweringWorker) -> None:
    with sdk.responses.stream(model=MODEL, input="Hi", tools=FLAT) as stream:
        final = stream.get_final_response()

    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]


@pytest.mark.parametrize("by_id", [False, True])
def test_a_response_goes_on_with_what_the_calls_brought(
    sdk: openai.OpenAI, tool_worker: AnsweringWorker, worker: ActingWorker, by_id: bool
) -> None:
    first = sdk.responses.create(model=MODEL, input="Hi", tools=FLAT)
    outputs = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "Sunny"} for item in first.output[1:]
    ]

    if by_id:
        sdk.responses.create(model=MODEL, input=outputs, previous_response_id=first.id, tools=FLAT)
    else:
        turns = [{"role": "user", "content": "Hi"}, *(item.model_dump() for item in first.output), *outputs]
        sdk.responses.create(model=MODEL, input=turns, tools=FLAT)

    second = sent(worker)[1]
    assert [turn.role for turn in second.messages] == ["user", "assistant", "tool", "tool"]
    assert second.messages[1].content == "I look. "
    assert [json.loads(call.function.arguments) for call in second.messages[1].tool_calls] == ASKED
    assert [turn.tool_call_id for turn in second.messages[2:]] == [item.call_id for item in first.output[1:]]
