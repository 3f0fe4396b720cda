"""``/health/live``, ``/health/ready`` and ``/metrics``: does it run, can it serve, how did it go; without a key."""

from __future__ import annotations

from typing import Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from lamella import LamellaError
from lamella_gateway import service as services


class LiveBody(TypedDict):
    """The process runs."""

    status: Literal["ok"]


class ReadyBody(TypedDict):
    """Whether requests can be served: the queue's server answers, and a worker is alive."""

    status: Literal["ok", "unavailable"]
    queue: bool
    workers: int


async def live(request: Request) -> JSONResponse:
    """Say that the process runs."""
    return JSONResponse(LiveBody(status="ok"))


async def ready(request: Request) -> JSONResponse:
    """Say whether requests can be served: 200, or 503."""
    try:
        workers = await services.of(request).client.workers()
    except LamellaError:
        return JSONResponse(ReadyBody(status="unavailable", queue=False, workers=0), 503)
    alive = sum(not worker.draining for worker in workers)
    body = ReadyBody(status="ok" if alive else "unavailable", queue=True, workers=alive)
    return JSONResponse(body, 200 if alive else 503)


async def metrics(request: Request) -> Response:
    """Tell the counters of this gateway."""
    return services.of(request).metrics.exposition(request)
