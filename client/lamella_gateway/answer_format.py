"""How an answer is to look, in OpenAI's two forms: a chat's, where a schema is nested, and a response's, where not.

Owns what is accepted and what the queue is told; which schemas can be enforced the engine says, by failing the job.
Neighbours: `chat_request`, `response_request`, `lamella.response_format`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lamella_gateway.request_base import RequestBase, Text

SchemaName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class TextFormat(RequestBase):
    """Text without a form."""

    type: Literal["text"]


class JsonFormat(RequestBase):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(RequestBase):
    """A JSON schema; it is always enforced, whatever `strict` says."""

    name: SchemaName
    description: Text | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = None


class ChatSchemaFormat(RequestBase):
    """JSON that a schema describes, as chat asks for it."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class ResponseSchemaFormat(NamedSchema):
    """JSON that a schema describes, as responses ask for it."""

    type: Literal["json_schema"]


ChatFormat = Annotated[TextFormat | JsonFormat | ChatSchemaFormat, Field(discriminator="type")]
ResponseFormat = Annotated[TextFormat | JsonFormat | ResponseSchemaFormat, Field(discriminator="type")]
AnyFormat = TextFormat | JsonFormat | ChatSchemaFormat | ResponseSchemaFormat


def queue_format(asked: AnyFormat | None) -> dict[str, object] | None:
    """Return what the queue is told of a format; None for text."""
    match asked:
        case None | TextFormat():
            return None
        case JsonFormat():
            return {"type": "json_object"}
        case ChatSchemaFormat(json_schema=named):
            return {"type": "json_schema", "schema": named.schema_}
        case ResponseSchemaFormat(schema_=schema):
            return {"type": "json_schema", "schema": schema}
