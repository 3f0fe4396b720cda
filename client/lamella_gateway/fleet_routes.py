"""``/lamella/account``, ``/lamella/workers``, ``/lamella/queues``: who asks, and how the service stands.

Owns who may see it: workers are an administrator's; queues are told of the models that a key may use, to every key.
Neighbours: `access`, `fleet_shapes`, `page_routes` (whose page asks every few seconds).
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse

from lamella import WorkerInfo, __version__
from lamella.queue_counts import QueueCounts, oldest_waiting, queue_counts
from lamella_gateway import service as services
from lamella_gateway.access import identify
from lamella_gateway.api_keys import Endpoint
from lamella_gateway.fleet_shapes import AccountBody, QueueBody, QueuesBody, WorkersBody, clock, worker_body

MODELS_SHOWN = 200


async def account(request: Request) -> JSONResponse:
    """Tell who asks, and what they may see."""
    caller = await identify(request)
    body = AccountBody(
        object="account",
        user=caller.user,
        key=None if caller.key is None else caller.key.name,
        is_admin=caller.is_admin,
        sees_jobs=caller.key is None or caller.key.allows(Endpoint.JOBS),
        version=__version__,
    )
    return JSONResponse(body, headers=FRESH)


async def workers(request: Request) -> JSONResponse:
    """List the live workers."""
    caller = await identify(request)
    caller.check_admin()
    now = clock()
    live = await services.of(request).client.workers()
    return JSONResponse(
        WorkersBody(object="list", at=now, data=[worker_body(each, now) for each in live]), headers=FRESH
    )


async def queues(request: Request) -> JSONResponse:
    """List the queues."""
    caller = await identify(request)
    service = services.of(request)
    keys, run = service.connection.keys, service.connection.run
    live = await service.client.workers()
    oldest = await run(oldest_waiting(keys))
    names = {model.name for worker in live for model in worker.served} | set(oldest)
    shown = sorted(name for name in names if caller.key is None or caller.key.allows_model(name))[:MODELS_SHOWN]
    counts = await run(queue_counts(keys, shown))
    now = clock()
    data = [_queue_body(name, counts[name], live, oldest.get(name), now) for name in shown]
    return JSONResponse(QueuesBody(object="list", at=now, data=data), headers=FRESH)


FRESH = {"cache-control": "no-store"}


def _queue_body(
    model: str, counts: QueueCounts, workers: Sequence[WorkerInfo], oldest_at: float | None, now: float
) -> QueueBody:
    serving = [(worker, each) for worker in workers for each in worker.served if each.name == model]
    return QueueBody(
        object="queue",
        model=model,
        workers=len(serving),
        slots=sum(each.slots for worker, each in serving if not worker.draining),
        waiting=counts.waiting,
        in_flight=counts.in_flight,
        oldest_s=None if oldest_at is None else max(0.0, round(now - oldest_at, 3)),
    )
