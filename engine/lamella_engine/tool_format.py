"""How a model writes calls of tools, read off its chat template, and the grammar that makes it call one.

Owns the formats' looks on the way out; the client's `tool_calls` finds calls of these looks in an answer. `admission`
asks, `text` renders the chat, `grammar` compiles.
"""

from __future__ import annotations

import json

from lamella_engine.errors import SequenceError
from lamella_engine.sequence_types import AnswerFormat, FormatKind, ToolChat, ToolFormat
from lamella_engine.text import TextCodec

MAX_FORCED_CALLS = 16
_NO_ARGUMENTS = {"type": "object", "additionalProperties": False}
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def tool_format_of(template: str) -> ToolFormat:
    """How a model with this chat template writes calls.

    Raises:
        SequenceError: in a way that is not known here (``tools_unsupported``).
    """
    is_xml = "<function=" in template or "<arg_key>" in template
    if "[TOOL_CALLS]" in template:
        return ToolFormat.MISTRAL_ARGS if "[ARGS]" in template else ToolFormat.MISTRAL
    if "<tool_call>" in template and not is_xml:
        return ToolFormat.HERMES
    if '"parameters"' in template and ("ipython" in template or "<|python_tag|>" in template):
        return ToolFormat.LLAMA3
    raise SequenceError(
        "tools_unsupported",
        "this model writes calls of tools in a way that Lamella does not read (it reads those of Hermes and Qwen, "
        "Llama 3, and Mistral); leave tools out and describe them in the prompt",
    )


def forced_call(codec: TextCodec, tool_format: ToolFormat, chat: ToolChat) -> AnswerFormat | None:
    """The format of an answer that calls one of the tools in ``chat.must_call``; None where the model chooses.

    Where several are named there may be several calls, if the model's way of writing them has room for them.
    """
    if not chat.must_call:
        return None
    functions = [tool["function"] for tool in json.loads(chat.tools or "[]")]
    wanted = [function for function in functions if function["name"] in chat.must_call]
    rules = [f"call: {' | '.join(f'call{place}' for place in range(len(wanted)))}"]
    for place, function in enumerate(wanted):
        schema = {"x-guidance": _JSON_FORM} | (function.get("parameters") or _NO_ARGUMENTS)
        rules.append(f"call{place}: {_call(codec, tool_format, function['name'])} args{place} {_after(tool_format)}")
        rules.append(f"args{place}: %json {json.dumps(schema)}")
    start = _start(codec, tool_format, MAX_FORCED_CALLS if len(wanted) > 1 else 1)
    return AnswerFormat(FormatKind.LARK, "\n".join([f"start: {start}", *rules]))


def _start(codec: TextCodec, tool_format: ToolFormat, most: int) -> str:
    more = f"{{0,{most - 1}}}"
    match tool_format:
        case ToolFormat.HERMES:
            line = _text("\n")
            whole = f"{_marker(codec, '<tool_call>')} {line} call {line} {_marker(codec, '</tool_call>')}"
            return f"{whole} ({line} {whole}){more}" if most > 1 else whole
        case ToolFormat.LLAMA3:
            return "call"
        case ToolFormat.MISTRAL:
            calls = f'call (", " call){more}' if most > 1 else "call"
            return f'{_marker(codec, "[TOOL_CALLS]")} " "? "[" {calls} "]"'
        case ToolFormat.MISTRAL_ARGS:
            return f"call (call){more}" if most > 1 else "call"


def _call(codec: TextCodec, tool_format: ToolFormat, name: str) -> str:
    """What comes before the arguments of one call."""
    if tool_format is ToolFormat.MISTRAL_ARGS:
        return f"{_marker(codec, '[TOOL_CALLS]')} {_text(name)} {_marker(codec, '[ARGS]')}"
    key = "parameters" if tool_format is ToolFormat.LLAMA3 else "arguments"
    return _text(f'{{"name": {json.dumps(name)}, "{key}": ')


def _after(tool_format: ToolFormat) -> str:
    return "" if tool_format is ToolFormat.MISTRAL_ARGS else _text("}")


def _marker(codec: TextCodec, marker: str) -> str:
    """A marker as a grammar has it: by its id where it is a special token, else as text."""
    token_id = codec.special_marker(marker)
    if token_id is not None:
        return f"<[{token_id}]>"
    return _text(marker)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
