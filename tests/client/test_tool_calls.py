"""Calls of tools are found in an answer however it is cut into pieces, and what is no call stays text."""

from __future__ import annotations

import json

import pytest

from lamella.completion import CompletionBuilder
from lamella.messages import Done, TokenEvent, ToolFormat, Usage
from lamella.stream_order import StreamItem
from lamella.tool_calls import ToolCallParser

PARIS = '{"city": "Paris \\"}{\\\\", "days": [1, {"a": null}]}'
ROME = '{"city": "Rome"}'


def hermes(arguments: str, name: str = "weather") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def plain(arguments: str, key: str, name: str = "weather") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


CASES: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    ("hermes", hermes(PARIS), "", [("weather", PARIS)]),
    (
        "hermes",
        f"I look.\n{hermes(PARIS)}\n{hermes(ROME, 'time')}\n",
        "I look.\n",
        [("weather", PARIS), ("time", ROME)],
    ),
    ("hermes", f"{hermes(ROME)} and so", " and so", [("weather", ROME)]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", "plain <tool text", "plain <tool text", []),
    ("hermes", "<tool_call> is a tag", "<tool_call> is a tag", []),
    ("hermes", '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, 2', "", [("f", '{"a": [1, 2')]),
    ("llama3", plain(PARIS, "parameters"), "", [("weather", PARIS)]),
    ("llama3", f"\n<|python_tag|>{plain(ROME, 'parameters')}", "", [("weather", ROME)]),
    (
        "llama3",
        f"{plain(ROME, 'parameters')}; {plain(PARIS, 'parameters', 'time')}\n",
        "",
        [("weather", ROME), ("time", PARIS)],
    ),
    ("llama3", f"It is {plain(ROME, 'parameters')}", f"It is {plain(ROME, 'parameters')}", []),
    ("llama3", '{"a": 1} is JSON {', '{"a": 1} is JSON {', []),
    ("llama3", "<|python", "<|python", []),
    ("mistral", f"[TOOL_CALLS] [{plain(PARIS, 'arguments')}]", "", [("weather", PARIS)]),
    (
        "mistral",
        f"Yes. [TOOL_CALLS][{plain(PARIS, 'arguments')}, {plain(ROME, 'arguments', 'time')}]",
        "Yes. ",
        [("weather", PARIS), ("time", ROME)],
    ),
    ("mistral", "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    ("mistral_args", f"[TOOL_CALLS]weather[ARGS]{PARIS}", "", [("weather", PARIS)]),
    (
        "mistral_args",
        f"Yes[TOOL_CALLS]weather[CALL_ID]123456789[ARGS]{PARIS}[TOOL_CALLS]time[ARGS]{ROME}",
        "Yes",
        [("weather", PARIS), ("time", ROME)],
    ),
    ("mistral_args", "[TOOL_CALLS]weather", "[TOOL_CALLS]weather", []),
]


def pieces_of(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("tool_format", "answer", "text", "calls"), CASES)
def test_text_and_calls_are_told_apart(
    tool_format: ToolFormat, answer: str, text: str, calls: list[tuple[str, str]], size: int
) -> None:
    parser = ToolCallParser(tool_format, "job")

    deltas = [*(parser.push(piece) for piece in pieces_of(answer, size)), parser.end()]

    assert "".join(delta.text for delta in deltas) == text
    assert [(call.function.name, call.function.arguments) for call in parser.calls] == calls
    streamed = [""] * len(calls)
    names: list[str | None] = [None] * len(calls)
    for call in (call for delta in deltas for call in delta.calls):
        assert (call.id is None) == (call.name is None) == (names[call.index] is not None)
        names[call.index] = names[call.index] or call.name
        streamed[call.index] += call.arguments
    assert names == [name for name, _ in calls]
    assert streamed == [arguments if arguments != "{}" else "" for _, arguments in calls]


def test_arguments_stream_before_the_call_has_ended() -> None:
    parser = ToolCallParser("hermes", "job")

    first = parser.push('<tool_call>\n{"name": "f", "arguments": {"city": "Par')
    second = parser.push("is")

    assert [(call.name, call.arguments) for call in first.calls] == [("f", '{"city": "Par')]
    assert [(call.id, call.name, call.arguments) for call in second.calls] == [(None, None, "is")]


def test_ids_are_of_nine_letters_and_the_same_for_every_reader() -> None:
    ids = []
    for job in ("a", "a", "b"):
        parser = ToolCallParser("hermes", job)
        parser.push(hermes(ROME) + hermes(ROME))
        ids.append([call.id for call in parser.calls])

    assert ids[0] == ids[1] != ids[2]
    assert len({*ids[0], *ids[2]}) == 4
    assert all(len(each) == 9 and each.isalnum() for each in ids[0])


def build(*texts: str, tool_format: ToolFormat | None) -> CompletionBuilder:
    builder = CompletionBuilder("job")
    for seq, text in enumerate(texts, 1):
        event = TokenEvent(token_ids=(seq,), text=text, tool_format=tool_format if seq == 1 else None)
        builder.add(StreamItem(seq, event))
    return builder


def test_a_completion_has_the_calls_beside_its_text() -> None:
    done = Done(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2))
    builder = build("I look. <tool", f"_call>{plain(ROME, 'arguments')}</tool_call>", tool_format="hermes")

    builder.add(StreamItem(3, done))
    completion = builder.completion(done)

    assert completion.text == "I look. "
    assert completion.finish_reason == "tool_calls"
    assert json.loads(completion.tool_calls[0].function.arguments) == {"city": "Rome"}


def test_an_answer_without_a_format_is_text_whatever_it_says() -> None:
    done = Done(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2))
    builder = build(hermes(ROME), tool_format=None)

    builder.add(StreamItem(2, done))
    completion = builder.completion(done)

    assert completion.text == hermes(ROME)
    assert (completion.finish_reason, completion.tool_calls) == ("stop", ())
