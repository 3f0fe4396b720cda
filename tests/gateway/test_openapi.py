"""The OpenAPI document is what is served: every route, every field, every answer; and nothing made from it is a 500."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import openai.types as sdk
import pytest
import redis
import schemathesis
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params
from pydantic import BaseModel
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from lamella.embedded import EmbeddedServer
from lamella_gateway.app import ROUTES
from lamella_gateway.batch_request import BatchRequest
from lamella_gateway.chat_request import ChatRequest
from lamella_gateway.completion_request import CompletionRequest
from lamella_gateway.embedding_request import EmbeddingRequest
from lamella_gateway.openapi import document
from lamella_gateway.response_request import ResponseRequest
from tests.client.acting_worker import MODEL
from tests.gateway.batch_lines import begin, chat_line
from tests.gateway.running_gateway import AnsweringWorker, RunningGateway

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "gateway.md"
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
OPERATIONS = [
    (method, path) for path, methods in document()["paths"].items() for method in methods if path != "/metrics"
]


@pytest.fixture(scope="module")
def served(session_server: EmbeddedServer) -> Iterator[RunningGateway]:
    client = redis.Redis.from_url(session_server.url, protocol=2, decode_responses=True, socket_timeout=40)
    client.flushall()
    with client, AnsweringWorker(client), RunningGateway(session_server.url) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def left(served: RunningGateway) -> dict[str, str]:
    """A file and a batch that are there, by the names their ids have in paths."""
    with served.client() as client:
        batch = begin(client, [chat_line(1)])
        return {"file_id": batch.input_file_id, "batch_id": batch.id}


def test_every_route_is_described_and_nothing_else() -> None:
    described = {(method.upper(), path) for path, methods in document()["paths"].items() for method in methods}

    assert described == {
        (method, route.path.replace(":path", "")) for route in ROUTES for method in (route.methods or ()) - {"HEAD"}
    }
    assert all(isinstance(route, Route) for route in ROUTES)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_nothing_made_from_the_document_breaks_the_gateway(
    served: RunningGateway, left: dict[str, str], method: str, path: str
) -> None:
    schema = schemathesis.openapi.from_dict(document())
    operation = schema[path][method.upper()]

    @hypothesis.given(case=operation.as_strategy(schemathesis.GenerationMode.NEGATIVE) | operation.as_strategy())
    @hypothesis.settings(
        max_examples=15,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def holds(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and len(str(case.body.get("model", ""))) % 2:
            case.body["model"] = MODEL  # half of them, so that some come as far as a worker
        if isinstance(case.body, dict) and len(str(case.body.get("input_file_id", ""))) % 2:
            case.body["input_file_id"] = left["file_id"]
        for name in left.keys() & (case.path_parameters or {}).keys():
            if len(str(case.path_parameters[name])) % 2:
                case.path_parameters[name] = left[name]
        case.call_and_validate(base_url=served.url, checks=list(CHECKS), headers={"Connection": "close"}, timeout=40)

    holds()


@pytest.mark.parametrize(
    ("served_model", "params"),
    [
        (ChatRequest, chat_params.CompletionCreateParamsBase),
        (CompletionRequest, sdk.completion_create_params.CompletionCreateParamsBase),
        (EmbeddingRequest, sdk.embedding_create_params.EmbeddingCreateParams),
        (ResponseRequest, response_create_params.ResponseCreateParamsBase),
        (BatchRequest, sdk.batch_create_params.BatchCreateParams),
    ],
)
def test_every_field_of_the_sdk_is_known(served_model: type[BaseModel], params: type) -> None:
    known = set(served_model.model_fields)

    streams = set() if served_model in (EmbeddingRequest, BatchRequest) else {"stream"}
    assert set(typing.get_type_hints(params)) | streams <= known


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest, EmbeddingRequest, ResponseRequest, BatchRequest])
def test_the_page_has_every_field(model: type[BaseModel]) -> None:
    page = PAGE.read_text()

    missing = [name for name in model.model_fields if f"`{name}`" not in page]

    assert missing == []
