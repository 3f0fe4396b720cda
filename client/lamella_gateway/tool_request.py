"""Tools as clients describe them, in OpenAI's two forms: a chat's, with a nested function, and a response's, without.

Owns what is accepted, and what the queue is told. `strict` is a promise that only a forced call keeps, so with any
other `tool_choice` it is refused. Neighbours: `chat_request`, `response_request`, `lamella.chat` (the queue's types).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from lamella.chat import MAX_TOOLS, FunctionTool, NamedTool, ToolChoice, check_tools
from lamella_gateway.request_base import RequestBase

WHY_TOOLS = "Only function tools are served"
WHY_CHOICE = "Use none, auto, required or one function that is among the tools"

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(RequestBase):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class ChatTool(RequestBase):
    """A tool, as chat describes it."""

    type: Literal["function"]
    function: Function


class ResponseTool(Function):
    """A tool, as responses describe it."""

    type: Literal["function"]


class ChosenFunction(RequestBase):
    """Which function must be called."""

    name: FunctionName


class ChatChoice(RequestBase):
    """The one function that must be called, as chat names it."""

    type: Literal["function"]
    function: ChosenFunction


class ResponseChoice(ChosenFunction):
    """The one function that must be called, as responses name it."""

    type: Literal["function"]


Mode = Literal["none", "auto", "required"]
ChatTools = Annotated[tuple[ChatTool, ...], Field(max_length=MAX_TOOLS)]
ResponseTools = Annotated[tuple[ResponseTool, ...], Field(max_length=MAX_TOOLS)]


class ToolTerms(NamedTuple):
    """What the queue is told: the tools, None for none, and whether one must be called."""

    tools: tuple[FunctionTool, ...] | None = None
    choice: ToolChoice | None = None


NO_TERMS = ToolTerms()


def tool_terms(
    tools: Sequence[ChatTool | ResponseTool] | None, choice: Mode | ChatChoice | ResponseChoice | None
) -> ToolTerms:
    """Return what the queue is told of tools.

    Raises:
        ValueError: they do not fit together.
    """
    functions = [tool.function if isinstance(tool, ChatTool) else tool for tool in tools or ()]
    if not functions and choice in (None, "none", "auto"):
        return NO_TERMS
    chosen = _chosen(choice)
    terms = ToolTerms(tuple(_queue_tool(each) for each in functions) or None, chosen)
    check_tools(terms.tools, terms.choice)
    is_forced = chosen == "required" or isinstance(chosen, NamedTool)
    if not is_forced and chosen != "none" and any(each.strict for each in functions):
        raise ValueError(
            "tools: strict cannot be promised while the model may also answer in text; leave it out, or use "
            "tool_choice 'required' or a named function: then calls keep to their schemas"
        )
    return terms


def _chosen(choice: Mode | ChatChoice | ResponseChoice | None) -> ToolChoice | None:
    match choice:
        case ChatChoice(function=function):
            return NamedTool(name=function.name)
        case ResponseChoice(name=name):
            return NamedTool(name=name)
        case _:
            return choice


def _queue_tool(function: Function) -> FunctionTool:
    schema = None if function.parameters is None else json.dumps(function.parameters, ensure_ascii=False)
    return FunctionTool(name=function.name, description=function.description, parameters=schema)
