"""``POST /v1/embeddings``: the vectors of texts, all texts of a request in one job."""

from __future__ import annotations

import base64
import json
from typing import Literal

from starlette.requests import Request
from typing_extensions import TypedDict

from lamella.embedding import EmbeddingsEvent
from lamella_gateway import service as services
from lamella_gateway.access import identify
from lamella_gateway.api_keys import Endpoint
from lamella_gateway.body import parse, read_body
from lamella_gateway.embedding_request import EmbeddingRequest
from lamella_gateway.generation import Generation, Order, Texts, begin
from lamella_gateway.live_response import WHOLE, LiveResponse, Pieces
from lamella_gateway.repeats import recognise


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
    texts = Texts(asked.texts, asked.pooling or "mean", is_normalised=asked.normalised is not False)
    order = Order(asked.model, (texts,), recognise(request, service, caller, body), user=asked.user)
    generation = await begin(service, caller, order)
    return LiveResponse(_whole(generation, asked), WHOLE, generation, service.settings)


async def _whole(generation: Generation, asked: EmbeddingRequest) -> Pieces:
    vectors, usage = await generation.vectors()
    body = EmbeddingsBody(
        object="list",
        data=[
            VectorBody(object="embedding", index=index, embedding=each)
            for index, each in enumerate(_encoded(vectors, asked))
        ],
        model=asked.model,
        usage=EmbeddingUsageBody(prompt_tokens=usage.prompt_tokens, total_tokens=usage.prompt_tokens),
    )
    yield json.dumps(body).encode()


def _encoded(event: EmbeddingsEvent, asked: EmbeddingRequest) -> list[list[float] | str]:
    if asked.encoding_format != "base64":
        return [list(vector) for vector in event.vectors]
    raw = base64.b64decode(event.values)
    size = len(raw) // event.count
    return [base64.b64encode(raw[at : at + size]).decode() for at in range(0, len(raw), size)]
