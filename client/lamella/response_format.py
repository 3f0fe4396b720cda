"""What an answer must look like, as a request says it: any JSON object, a JSON schema, a regex, a choice, a grammar.

Owns the types, their bounds, and the forms in which a caller may give one. Whether a schema can be enforced is for the
engine to say, which has the means: it refuses the job with the reason. Neighbours: `messages` (requests carry one),
`request_draft` (takes it from callers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator

from lamella.wire import Wire, check_unicode, count_characters

MAX_FORMAT_CHARS = 200_000
MAX_CHOICES = 1000


class JsonObjectFormat(Wire):
    """Any JSON object."""

    type: Literal["json_object"] = "json_object"


class JsonSchemaFormat(Wire):
    """JSON that a schema describes; `json_schema` is the schema as JSON text, its keys in the order of the answer's."""

    type: Literal["json_schema"] = "json_schema"
    json_schema: str = Field(max_length=MAX_FORMAT_CHARS, repr=False)

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, value: str) -> str:
        check_unicode(value, "the schema")
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the schema is no JSON that can be read: {error}") from error
        if not isinstance(schema, dict | bool):
            raise ValueError("a JSON schema is an object, such as {'type': 'object', 'properties': {...}}")
        return value


class RegexFormat(Wire):
    """Text that matches a regular expression from its first to its last character."""

    type: Literal["regex"] = "regex"
    regex: str = Field(min_length=1, max_length=MAX_FORMAT_CHARS, repr=False)

    @field_validator("regex")
    @classmethod
    def _is_text(cls, value: str) -> str:
        check_unicode(value, "the regular expression")
        return value


class ChoiceFormat(Wire):
    """Exactly one of these texts."""

    type: Literal["choice"] = "choice"
    choice: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1, max_length=MAX_CHOICES, repr=False)

    @field_validator("choice")
    @classmethod
    def _are_texts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        count_characters("choice", MAX_FORMAT_CHARS, *value)
        for text in value:
            check_unicode(text, "a choice")
        return value


class GrammarFormat(Wire):
    """Text of a context-free grammar, in llguidance's variant of Lark."""

    type: Literal["grammar"] = "grammar"
    grammar: str = Field(min_length=1, max_length=MAX_FORMAT_CHARS, repr=False)

    @field_validator("grammar")
    @classmethod
    def _is_text(cls, value: str) -> str:
        check_unicode(value, "the grammar")
        return value


ResponseFormat = Annotated[
    JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat | GrammarFormat, Field(discriminator="type")
]
FORMATS: dict[str, type[Wire]] = {
    "json_object": JsonObjectFormat,
    "json_schema": JsonSchemaFormat,
    "regex": RegexFormat,
    "choice": ChoiceFormat,
    "grammar": GrammarFormat,
}
FormatArgument = (
    JsonObjectFormat
    | JsonSchemaFormat
    | RegexFormat
    | ChoiceFormat
    | GrammarFormat
    | type[BaseModel]
    | Mapping[str, object]
)


def format_fields(given: object) -> Mapping[str, object] | None:
    """What a caller gives, as the fields of a format; None for plain text.

    Taken are a mapping with "type" and, for a schema, "schema" (a mapping or JSON text) or OpenAI's nested
    {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}; and a pydantic model's class.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(given, type) and issubclass(given, BaseModel):
        return {"type": "json_schema", "json_schema": json.dumps(given.model_json_schema())}
    if isinstance(given, Wire):
        return given.model_dump()
    if not isinstance(given, Mapping):
        raise ValueError(
            "use a mapping such as {'type': 'json_schema', 'schema': {...}}, or a pydantic model's class, "
            f"not {type(given).__name__}"
        )
    kind = given.get("type")
    if kind == "text":
        _check_keys(given, {"type"})
        return None
    if kind not in FORMATS:
        raise ValueError(f"type is {str(kind)[:60]!r}; use one of {', '.join(map(repr, ('text', *FORMATS)))}")
    if kind == "json_schema":
        return {"type": kind, "json_schema": _schema_text(given)}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return {str(name): value for name, value in fields.items()}


def _schema_text(given: Mapping[str, object]) -> object:
    if "schema" in given:
        _check_keys(given, {"type", "schema"})
        schema = given["schema"]
    else:
        _check_keys(given, {"type", "json_schema"})
        schema = given.get("json_schema")
        if isinstance(schema, Mapping):
            _check_keys(schema, {"name", "description", "schema", "strict"})
            schema = schema.get("schema")
    if schema is None:
        raise ValueError("there is no schema; give {'type': 'json_schema', 'schema': {...}}")
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        return schema
    try:
        return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the schema cannot be written as JSON: {error}") from error


def _check_keys(given: Mapping[str, object], known: set[str]) -> None:
    unknown = sorted(str(key)[:60] for key in given if key not in known)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
