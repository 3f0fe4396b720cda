"""``POST /v1/embeddings``: the vectors of texts, all texts of a request in one job."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Sequence
from sys import byteorder
from typing import Literal

from starlette.requests import Request
from typing_extensions import TypedDict

from lamella import Usage
from lamella_gateway import service as services
from lamella_gateway.access import identify
from lamella_gateway.api_keys import Endpoint
from lamella_gateway.body import parse, read_body
from lamella_gateway.embedding_request import EmbeddingRequest
from lamella_gateway.generation import Generation, begin
from lamella_gateway.live_response import WHOLE, LiveResponse, Pieces
from lamella_gateway.order import Order, Texts
from lamella_gateway.repeats import NO_REPEAT, Repeat, recognise


class VectorBody(TypedDict):
    """The vector of one text: numbers, or base64 of float32, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsageBody(TypedDict):
    """What the vectors cost."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsBody(TypedDict):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[VectorBody]
    model: str
    usage: EmbeddingUsageBody


async def embeddings(request: Request) -> LiveResponse:
    """Return the vectors of texts."""
    service = services.of(request)
    caller = await identify(request, Endpoint.EMBEDDINGS)
    body = await read_body(request)
    asked = parse(EmbeddingRequest, body)
    caller.check_model(asked.model)
    await service.models.find(asked.model)
    generation = await begin(service, caller, embedding_order(asked, recognise(request, service, caller, body)))
    return LiveResponse(_whole(generation, asked), WHOLE, generation, service.settings)


def embedding_order(asked: EmbeddingRequest, repeat: Repeat = NO_REPEAT) -> Order:
    """Return the job of a request, one for all texts."""
    texts = Texts(asked.texts, asked.pooling or "mean", is_normalised=asked.normalised is not False)
    return Order(asked.model, (texts,), repeat, user=asked.user)


def embeddings_body(asked: EmbeddingRequest, vectors: Sequence[Sequence[float]], usage: Usage) -> EmbeddingsBody:
    """Return the vectors of a request."""
    return EmbeddingsBody(
        object="list",
        data=[
            VectorBody(object="embedding", index=index, embedding=_encoded(vector, asked))
            for index, vector in enumerate(vectors)
        ],
        model=asked.model,
        usage=EmbeddingUsageBody(prompt_tokens=usage.prompt_tokens, total_tokens=usage.prompt_tokens),
    )


async def _whole(generation: Generation, asked: EmbeddingRequest) -> Pieces:
    event, usage = await generation.vectors()
    yield json.dumps(embeddings_body(asked, event.vectors, usage)).encode()


def _encoded(vector: Sequence[float], asked: EmbeddingRequest) -> list[float] | str:
    if asked.encoding_format != "base64":
        return list(vector)
    numbers = array("f", vector)
    if byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
