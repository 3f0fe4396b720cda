"""From a job's request, as the wire has it, to a sequence, as the engine takes it."""

from __future__ import annotations

import json

from lamella.chat import ChatMessage, FunctionTool, NamedTool
from lamella.embedding import EmbedRequest
from lamella.messages import GenerateRequest
from lamella.response_format import (
    ChoiceFormat,
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    ResponseFormat,
)
from lamella_engine.sequence_types import (
    AnswerFormat,
    EmbeddingTerms,
    FormatKind,
    Pooling,
    Sampling,
    SequenceRequest,
    ToolChat,
)


def sequence_request(
    sequence_id: str, request: GenerateRequest | EmbedRequest, generated_ids: tuple[int, ...]
) -> SequenceRequest:
    """Return the engine's form of `request`, to go on after the tokens its stream already holds."""
    if isinstance(request, EmbedRequest):
        terms = EmbeddingTerms(request.texts, Pooling(request.pooling), request.normalised)
        return SequenceRequest(sequence_id, embedding=terms)
    messages, tool_chat = None, None
    if request.messages is not None and request.concerns_tools:
        tool_chat = _tool_chat(request, request.messages)
    elif request.messages is not None:
        messages = tuple((message.role, message.text) for message in request.messages)
    return SequenceRequest(
        sequence_id=sequence_id,
        sampling=Sampling(**dict(request.sampling)),
        prompt=request.prompt,
        messages=messages,
        generated_ids=generated_ids,
        answer_format=None if request.response_format is None else _answer_format(request.response_format),
        tool_chat=tool_chat,
    )


def _answer_format(wanted: ResponseFormat) -> AnswerFormat:
    match wanted:
        case JsonObjectFormat():
            return AnswerFormat(FormatKind.JSON_OBJECT)
        case JsonSchemaFormat(json_schema=schema):
            return AnswerFormat(FormatKind.JSON_SCHEMA, schema)
        case RegexFormat(regex=regex):
            return AnswerFormat(FormatKind.REGEX, regex)
        case ChoiceFormat(choice=choice):
            return AnswerFormat(FormatKind.CHOICE, json.dumps(choice))
        case GrammarFormat(grammar=grammar):
            return AnswerFormat(FormatKind.LARK, grammar)


def _tool_chat(request: GenerateRequest, messages: tuple[ChatMessage, ...]) -> ToolChat:
    """Messages and tools as chat templates take them; with the choice "none" the model sees no tool."""
    tools = () if request.tool_choice == "none" else request.tools or ()
    must_call: tuple[str, ...] = ()
    if isinstance(request.tool_choice, NamedTool):
        must_call = (request.tool_choice.name,)
    elif request.tool_choice == "required":
        must_call = tuple(tool.name for tool in tools)
    return ToolChat(
        messages=json.dumps([_turn(message) for message in messages], ensure_ascii=False),
        tools=json.dumps([_function(tool) for tool in tools], ensure_ascii=False) if tools else None,
        must_call=must_call,
    )


def _turn(message: ChatMessage) -> dict[str, object]:
    turn: dict[str, object] = {"role": message.role, "content": message.text}
    if message.tool_calls is not None:
        turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _function(tool: FunctionTool) -> dict[str, object]:
    function: dict[str, object] = {"name": tool.name, "description": tool.description or ""}
    function["parameters"] = json.loads(tool.parameters or '{"type": "object", "properties": {}}')
    return {"type": "function", "function": function}
