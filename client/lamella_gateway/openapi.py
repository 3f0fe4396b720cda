"""The OpenAPI document, made from the very types that requests are checked by and answers are written as.

Owns what each route says it takes and returns. A new route has its entry here; a test holds both against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from lamella import JobState, __version__
from lamella_gateway.batch_request import BatchRequest
from lamella_gateway.batch_shapes import BatchBody, BatchesBody
from lamella_gateway.batch_store import BATCH
from lamella_gateway.batches import MOST_LISTED
from lamella_gateway.chat_request import ChatRequest
from lamella_gateway.chat_shapes import ChatBody
from lamella_gateway.completion_request import CompletionRequest
from lamella_gateway.completion_shapes import CompletionBody
from lamella_gateway.embedding_request import EmbeddingRequest
from lamella_gateway.embeddings import EmbeddingsBody
from lamella_gateway.file_shapes import DeletedFileBody, FileBody, FilesBody
from lamella_gateway.file_store import FILE
from lamella_gateway.files import LONGEST_KEEP_S, MOST_FILES, PURPOSES, SHORTEST_KEEP_S
from lamella_gateway.fleet_shapes import AccountBody, JobBody, JobsBody, QueuesBody, WorkersBody
from lamella_gateway.health import LiveBody, ReadyBody
from lamella_gateway.job_routes import MOST_JOBS
from lamella_gateway.models import ModelBody, ModelsBody
from lamella_gateway.response_request import LOGPROBS, ResponseRequest
from lamella_gateway.response_shapes import DeletedBody, ResponseBody

Schema = dict[str, object]
_REF = "#/components/schemas/{model}"
_ID = {"type": "string", "minLength": 1}


class ErrorDetail(TypedDict):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(TypedDict):
    """Every answer that is an error."""

    error: ErrorDetail


_REQUESTS: tuple[type, ...] = (ChatRequest, CompletionRequest, EmbeddingRequest, ResponseRequest, BatchRequest)
_ANSWERS: tuple[type, ...] = (
    *(ChatBody, CompletionBody, EmbeddingsBody, ResponseBody, DeletedBody, ModelBody, ModelsBody),
    *(FileBody, FilesBody, DeletedFileBody, BatchBody, BatchesBody),
    *(AccountBody, WorkersBody, QueuesBody, JobBody, JobsBody),
    *(LiveBody, ReadyBody, ErrorEnvelope),
)
_SAID = {
    400: "The request cannot be used; `param` names the field",
    401: "No valid API key",
    403: "The key may not",
    404: "There is no such model, response, file, batch or job",
    409: "The job was cancelled by somebody else, or the batch has ended",
    413: "The body is too large, or the files of the key are",
    415: "The body is not declared as what it has to be",
    422: "The Idempotency-Key belongs to another request",
    429: "A rate, quota or queue is full; Retry-After says when to come back",
    500: "A job failed",
    503: "No worker serves the model, or the queue is away; Retry-After says when to come back",
    504: "It took too long",
}
_ASKING = (400, 401, 403, 404, 500, 503)
_MAKING = tuple(_SAID)


def document() -> Schema:
    """Return the OpenAPI document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Lamella gateway",
            "version": __version__,
            "description": "The OpenAI API in front of models that are bigger than the GPUs at hand.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _paths() -> Schema:
    response_id = _parameter("response_id", "path", _ID)
    return {
        "/v1/models": {"get": _operation("listModels", "List the models that are served", ModelsBody)},
        "/v1/models/{model}": {
            "get": _operation("retrieveModel", "Tell about one model", ModelBody, [_parameter("model", "path", _ID)])
        },
        "/v1/chat/completions": {"post": _making("createChatCompletion", "Answer a chat", ChatRequest, ChatBody)},
        "/v1/completions": {"post": _making("createCompletion", "Go on with texts", CompletionRequest, CompletionBody)},
        "/v1/embeddings": {
            "post": _making("createEmbedding", "Return the vectors of texts", EmbeddingRequest, EmbeddingsBody, False)
        },
        "/v1/responses": {
            "post": _making("createResponse", "Answer an input, now or later", ResponseRequest, ResponseBody)
        },
        "/v1/responses/{response_id}": {
            "get": _operation(
                "retrieveResponse",
                "Fetch a response, or its events",
                ResponseBody,
                [response_id, *_stream_query()],
                True,
            ),
            "delete": _operation("deleteResponse", "Delete a response", DeletedBody, [response_id]),
        },
        "/v1/responses/{response_id}/cancel": {
            "post": _operation("cancelResponse", "Cancel a background response", ResponseBody, [response_id])
        },
        **_batch_paths(),
        **_fleet_paths(),
        "/health/live": {"get": _open("live", "Whether the process runs", {"200": _json(LiveBody)})},
        "/health/ready": {
            "get": _open("ready", "Whether requests can be served", {"200": _json(ReadyBody), "503": _json(ReadyBody)})
        },
        "/metrics": {"get": _open("metrics", "Counters for Prometheus", {"200": _METRICS})},
        "/openapi.json": {"get": _open("openapi", "This document", {"200": _DOCUMENT})},
    }


def _batch_paths() -> Schema:
    file_id, batch_id = _parameter("file_id", "path", _ID), _parameter("batch_id", "path", _ID)
    purpose = _parameter("purpose", "query", {"enum": list(PURPOSES)})
    order = _parameter("order", "query", {"enum": ["asc", "desc"]})
    upload = _operation("createFile", "Keep a file", FileBody, errors=(*_ASKING, 413, 415, 429))
    upload["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
    read = _operation("retrieveFileContent", "Read a file", FileBody, [file_id])
    read["responses"] = {**_responses(read), "200": _CONTENT, "206": _CONTENT}
    made = _making("createBatch", "Answer a file of requests in time", BatchRequest, BatchBody, False)
    return {
        "/v1/files": {
            "post": upload,
            "get": _operation("listFiles", "List files", FilesBody, [*_page_query(FILE, MOST_FILES), order, purpose]),
        },
        "/v1/files/{file_id}": {
            "get": _operation("retrieveFile", "Tell about a file", FileBody, [file_id]),
            "delete": _operation("deleteFile", "Delete a file", DeletedFileBody, [file_id]),
        },
        "/v1/files/{file_id}/content": {"get": read},
        "/v1/batches": {
            "post": made,
            "get": _operation("listBatches", "List batches", BatchesBody, _page_query(BATCH, MOST_LISTED)),
        },
        "/v1/batches/{batch_id}": {"get": _operation("retrieveBatch", "Tell about a batch", BatchBody, [batch_id])},
        "/v1/batches/{batch_id}/cancel": {
            "post": _operation("cancelBatch", "Cancel a batch", BatchBody, [batch_id], errors=(*_ASKING, 409))
        },
    }


def _page_query(kind: str, most: int) -> list[Schema]:
    return [
        _parameter("after", "query", {"type": "string", "pattern": f"^{kind}[0-9a-f]{{24}}$"}),
        _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": most}),
    ]


def _responses(operation: Schema) -> Schema:
    found = operation["responses"]
    assert isinstance(found, dict)  # noqa: S101  # put there by `_operation`
    return found


def _fleet_paths() -> Schema:
    job_id = _parameter("job_id", "path", _ID)
    listing = [
        _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": MOST_JOBS}),
        _parameter("state", "query", {"enum": list(JobState)}),
    ]
    return {
        "/lamella/account": {"get": _operation("account", "Tell who asks, and what they may see", AccountBody)},
        "/lamella/workers": {"get": _operation("listWorkers", "List live workers; for administrators", WorkersBody)},
        "/lamella/queues": {"get": _operation("listQueues", "List the queues of models", QueuesBody)},
        "/lamella/jobs": {"get": _operation("listJobs", "List the newest jobs", JobsBody, listing)},
        "/lamella/jobs/{job_id}": {"get": _operation("retrieveJob", "Tell about one job", JobBody, [job_id])},
        "/lamella/jobs/{job_id}/cancel": {"post": _operation("cancelJob", "Cancel a job", JobBody, [job_id])},
        "/lamella/jobs/{job_id}/retry": {
            "post": _operation(
                "retryJob", "Let a dead job go on as a new one", JobBody, [job_id], errors=(*_ASKING, 429)
            )
        },
    }


_METRICS: Schema = {
    "description": "Counters",
    "content": {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")},
}
_DOCUMENT: Schema = {
    "description": "An OpenAPI document",
    "content": {"application/json": {"schema": {"type": "object"}}},
}


_UPLOAD: Schema = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"const": "batch"},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": SHORTEST_KEEP_S, "maximum": LONGEST_KEEP_S},
    },
    "required": ["file", "purpose"],
    "additionalProperties": False,
}
_CONTENT: Schema = {
    "description": "What is in the file",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}


def _parameter(name: str, place: Literal["path", "query", "header"], schema: Schema) -> Schema:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}


def _stream_query() -> list[Schema]:
    return [
        _parameter("stream", "query", {"type": "boolean"}),
        _parameter("starting_after", "query", {"type": "integer", "minimum": 0, "maximum": 10**15 - 1}),
        _parameter("include", "query", {"type": "array", "items": {"const": LOGPROBS}}),
        _parameter("include_obfuscation", "query", {"const": False}),
    ]


def _making(name: str, summary: str, taken: type, returned: type, streams: bool = True) -> Schema:
    key = _parameter(
        "Idempotency-Key", "header", {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"}
    )
    made = _operation(name, summary, returned, [key], streams, _MAKING)
    made["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(taken)}}}
    return made


def _operation(
    name: str,
    summary: str,
    returned: type,
    parameters: Sequence[Schema] = (),
    streams: bool = False,
    errors: Sequence[int] = _ASKING,
) -> Schema:
    answer = _json(returned)
    if streams:
        whole = {"application/json": {"schema": _ref(returned)}}
        answer["content"] = {**whole, "text/event-stream": {"schema": {"type": "string"}}}
    failed: Schema = {str(status): {**_json(ErrorEnvelope), "description": _SAID[status]} for status in errors}
    return {
        "operationId": name,
        "summary": summary,
        "parameters": list(parameters),
        "responses": {"200": answer, **failed},
    }


def _open(name: str, summary: str, responses: Mapping[str, Schema]) -> Schema:
    return {"operationId": name, "summary": summary, "security": [], "responses": dict(responses)}


def _json(kind: type) -> Schema:
    return {"description": _summary(kind), "content": {"application/json": {"schema": _ref(kind)}}}


def _ref(kind: type) -> Schema:
    return {"$ref": _REF.format(model=kind.__name__)}


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").partition("\n")[0]


def _schemas() -> Schema:
    found: Schema = {}
    for kinds, mode in ((_REQUESTS, "validation"), (_ANSWERS, "serialization")):
        for kind in kinds:
            schema = TypeAdapter(kind).json_schema(
                ref_template=_REF, mode="validation" if mode == "validation" else "serialization"
            )
            found.update(schema.pop("$defs", {}))
            found.setdefault(kind.__name__, schema)
    return found
