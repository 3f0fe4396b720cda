"""Tools reach the model through its own template, and a call that must be made is made in the model's own form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella.tool_calls import ToolCallParser
from lamella_engine import Engine, EngineOptions, Sampling, SequenceRequest, SequenceTokens, ShardStore
from lamella_engine.errors import SequenceError
from lamella_engine.sequence_types import ToolChat, ToolFormat
from lamella_engine.text import TextCodec
from lamella_engine.tool_format import tool_format_of
from tests import tiny_models

_TURNS = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}CALL {{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}{{ message.tool_call_id or '' }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_TOOLS = "{% for tool in tools %}{{ tool.function.name }}: {{ tool.function.description }} {% endfor %}"
TEMPLATES = {
    ToolFormat.HERMES: "{% if tools %}Call with <tool_call></tool_call>: " + _TOOLS + "{% endif %}" + _TURNS,
    ToolFormat.LLAMA3: 'Environment: ipython\n{% if tools %}{"name":, "parameters":} '
    + _TOOLS
    + "{% endif %}"
    + _TURNS,
    ToolFormat.MISTRAL: "{% if tools %}[TOOL_CALLS] " + _TOOLS + "{% endif %}" + _TURNS,
    ToolFormat.MISTRAL_ARGS: "{% if tools %}[TOOL_CALLS] [ARGS] " + _TOOLS + "{% endif %}" + _TURNS,
}
MARKERS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "maximum": 9, "minimum": 0}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Paris", "Rome"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "", "parameters": None}}
QUESTION = [{"role": "user", "content": "How is the weather in Paris?"}]


def with_template(directory: Path, template: str, *, special: bool) -> Path:
    """A tiny model with this chat template; the marks of calls are special tokens, or text."""
    tiny_models.save_tiny_llama(directory)
    codec = TextCodec(directory)
    codec.tokenizer.chat_template = template
    if special:
        # They take the places of tokens that were there, so that the model's vocabulary stays.
        text = (directory / "tokenizer.json").read_text()
        state = json.loads(text)
        for place, marker in enumerate(MARKERS, 3):
            old = state["added_tokens"][place]["content"]
            state["added_tokens"][place]["content"] = marker
            state["model"]["vocab"][marker] = state["model"]["vocab"].pop(old)
        (directory / "tokenizer.json").write_text(json.dumps(state))
        (directory / "chat_template.jinja").write_text(template)
    else:
        codec.tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[ToolFormat, bool], Engine]]:
    root = tmp_path_factory.mktemp("store")
    opened: dict[tuple[ToolFormat, bool], Engine] = {}
    try:
        for tool_format in ToolFormat:
            for special in (False, True):
                name = f"{tool_format.value}-{special}".lower()
                directory = with_template(tmp_path_factory.mktemp(name), TEMPLATES[tool_format], special=special)
                ShardStore(root).ensure(name, source=directory)
                options = EngineOptions(store=root, device="cpu", max_sequences=2, sweep_tokens=64, offline=True)
                opened[tool_format, special] = Engine.open(name, options)
        yield opened
    finally:
        for engine in opened.values():
            engine.close()


def ask(engine: Engine, chat: ToolChat, sampling: Sampling | None = None) -> tuple[str, ToolFormat | None]:
    engine.submit(SequenceRequest("s", sampling or Sampling(max_tokens=300), tool_chat=chat))
    text, formats = "", []
    for batch in engine.events(poll_s=0.1):
        for event in batch.events:
            if isinstance(event, SequenceTokens):
                text += event.text
                formats.append(event.tool_format)
            elif event.sequence_id == "s" and hasattr(event, "reason"):
                assert event.reason == "stop", event
                assert all(each is None for each in formats[1:])
                return text, formats[0]
    raise AssertionError("the engine was closed")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("tool_format", ToolFormat)
def test_a_named_tool_is_called_once_in_the_models_own_form(
    engines: dict[tuple[ToolFormat, bool], Engine], tool_format: ToolFormat, special: bool
) -> None:
    chat = ToolChat(json.dumps(QUESTION), json.dumps([CLOCK, WEATHER]), ("weather",))

    text, told = ask(engines[tool_format, special], chat)

    assert told is tool_format
    parser = ToolCallParser(tool_format.value, "job")
    assert (parser.push(text).text + parser.end().text).strip() == ""
    assert [call.function.name for call in parser.calls] == ["weather"]
    arguments = json.loads(parser.calls[0].function.arguments)
    assert set(arguments) == {"city", "days"}
    assert arguments["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("tool_format", ToolFormat)
def test_where_a_call_is_required_each_call_keeps_to_its_schema(
    engines: dict[tuple[ToolFormat, bool], Engine], tool_format: ToolFormat, special: bool
) -> None:
    chat = ToolChat(json.dumps(QUESTION), json.dumps([CLOCK, WEATHER]), ("clock", "weather"))
    sampling = Sampling(max_tokens=400, temperature=1.0, seed=5)

    text, _ = ask(engines[tool_format, special], chat, sampling)

    parser = ToolCallParser(tool_format.value, "job")
    parser.push(text)
    parser.end()
    assert parser.calls
    for call in parser.calls:
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == ({"city", "days"} if call.function.name == "weather" else set())


def test_the_template_is_given_tools_calls_and_results(engines: dict[tuple[ToolFormat, bool], Engine]) -> None:
    codec = engines[ToolFormat.HERMES, False].codec
    assert codec is not None
    turns = [
        *QUESTION,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
                {"id": "b", "type": "function", "function": {"name": "weather", "arguments": "no JSON"}},
            ],
        },
        {"role": "tool", "content": "It rains.", "tool_call_id": "a"},
    ]

    text = codec.decode(codec.encode_tool_chat(ToolChat(json.dumps(turns), json.dumps([WEATHER]))))

    assert "weather: Weather of a city" in text
    assert 'CALL weather {"city": "Rome"}CALL weather "no JSON"' in text
    assert "It rains.a" in text


def test_a_template_without_tools_is_refused(tiny_llama_dir: Path) -> None:
    chat = ToolChat(json.dumps(QUESTION), json.dumps([WEATHER]))

    with pytest.raises(SequenceError, match="knows no tools") as caught:
        TextCodec(tiny_llama_dir).encode_tool_chat(chat)

    assert caught.value.code == "tools_unsupported"


@pytest.mark.parametrize("template", ["{{ tools }}", "<tool_call><function=name>", "<tool_call><arg_key>"])
def test_an_unknown_way_of_calling_is_refused(template: str) -> None:
    with pytest.raises(SequenceError, match="does not read") as caught:
        tool_format_of(template)

    assert caught.value.code == "tools_unsupported"


def test_a_schema_of_arguments_that_cannot_be_enforced_is_refused(
    engines: dict[tuple[ToolFormat, bool], Engine],
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "wat"}}}
    chat = ToolChat(json.dumps(QUESTION), json.dumps([tool]), ("f",))

    with pytest.raises(SequenceError, match="wat"):
        ask(engines[ToolFormat.HERMES, False], chat)
