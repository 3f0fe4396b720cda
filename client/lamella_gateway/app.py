"""The application: routes, what is around all of them, and the edge where errors become answers.

Owns which path goes where, request ids, counting, CORS, and the service's life. Neighbours: one module a noun with its
routes, `service`, `openapi`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lamella import LamellaError
from lamella_gateway import (
    batches,
    chat,
    completions,
    documents,
    embeddings,
    files,
    fleet_routes,
    health,
    job_routes,
    models,
    page_routes,
    responses,
)
from lamella_gateway.api_error import SERVER, ApiError, from_lamella
from lamella_gateway.desk import Desk
from lamella_gateway.service import Service
from lamella_gateway.settings import Settings

log = logging.getLogger(__name__)

ROUTES = (
    Route("/v1/models", models.list_models, methods=["GET"]),
    Route("/v1/models/{model:path}", models.retrieve_model, methods=["GET"]),
    Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
    Route("/v1/completions", completions.completions, methods=["POST"]),
    Route("/v1/embeddings", embeddings.embeddings, methods=["POST"]),
    Route("/v1/responses", responses.create_response, methods=["POST"]),
    Route("/v1/responses/{response_id}", responses.stored_response, methods=["GET", "DELETE"]),
    Route("/v1/responses/{response_id}/cancel", responses.cancel_response, methods=["POST"]),
    Route("/v1/files", files.create_file, methods=["POST"]),
    Route("/v1/files", files.list_files, methods=["GET"]),
    Route("/v1/files/{file_id}", files.stored_file, methods=["GET", "DELETE"]),
    Route("/v1/files/{file_id}/content", files.file_content, methods=["GET"]),
    Route("/v1/batches", batches.create_batch, methods=["POST"]),
    Route("/v1/batches", batches.list_batches, methods=["GET"]),
    Route("/v1/batches/{batch_id}", batches.retrieve_batch, methods=["GET"]),
    Route("/v1/batches/{batch_id}/cancel", batches.cancel_batch, methods=["POST"]),
    Route("/lamella/account", fleet_routes.account, methods=["GET"]),
    Route("/lamella/workers", fleet_routes.workers, methods=["GET"]),
    Route("/lamella/queues", fleet_routes.queues, methods=["GET"]),
    Route("/lamella/jobs", job_routes.list_jobs, methods=["GET"]),
    Route("/lamella/jobs/{job_id}", job_routes.retrieve_job, methods=["GET"]),
    Route("/lamella/jobs/{job_id}/cancel", job_routes.cancel_job, methods=["POST"]),
    Route("/lamella/jobs/{job_id}/retry", job_routes.retry_job, methods=["POST"]),
    Route("/health/live", health.live, methods=["GET"]),
    Route("/health/ready", health.ready, methods=["GET"]),
    Route("/metrics", health.metrics, methods=["GET"]),
    Route("/openapi.json", documents.openapi, methods=["GET"]),
)

_PATHS: dict[object, str] = {route.endpoint: route.path for route in (*ROUTES, *page_routes.ROUTES)}


def make_app(settings: Settings) -> Starlette:
    """Return the application; its service is opened when the server starts it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with Service.make(settings) as service, Desk.make(settings) as desk:
            app.state.service, app.state.desk = service, desk
            yield

    middleware = [Middleware(Counted)]
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    return Starlette(
        routes=[*ROUTES, *page_routes.ROUTES],
        middleware=middleware,
        exception_handlers={
            ApiError: _api_error,
            LamellaError: _lamella_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _bug,
        },
        lifespan=lifespan,
    )


class Counted:
    """Gives each request an id, and counts it with its status and time under the route it took."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # as others call a client that left before there was an answer
        request_id = f"req_{secrets.token_hex(12)}".encode()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            endpoint = _PATHS.get(scope.get("endpoint"), "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "OPTIONS") else "other"
            metrics = scope["app"].state.service.metrics
            metrics.requests.labels(endpoint, method, str(status)).inc()
            metrics.seconds.labels(endpoint).observe(time.monotonic() - began)


def _answer(error: ApiError) -> Response:
    return Response(error.body(), error.status, error.headers())


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101  # the handler of this type
    return _answer(error)


async def _lamella_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LamellaError)  # noqa: S101  # the handler of this type
    answer = from_lamella(error)
    if answer.status >= 500:
        log.warning("%s %s: %s", request.method, request.url.path, error)
    return _answer(answer)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  # the handler of this type
    what = f"{request.method} {request.url.path[:200]}"
    said = f"{what} is not served; GET /openapi.json lists what is" if error.status_code in (404, 405) else error.detail
    answer = _answer(ApiError(error.status_code, said, code="not_served"))
    answer.headers.update(error.headers or {})
    return answer


async def _gone(request: Request, error: Exception) -> Response:
    return _answer(ApiError(400, "the request ended before its body did", code="incomplete_body"))


async def _bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _answer(ApiError(500, "the gateway failed; its log says why", type=SERVER, code="internal_error"))
