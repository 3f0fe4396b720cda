"""``/lamella/jobs``: what became of jobs, whatever made them; cancels and retries them.

Owns whose jobs are seen: a key's user's own, everybody's by an administrator. What a job was asked and what it answered
is not told here. Neighbours: `access`, `job_list`, `fleet_shapes`, `meter` (a retry is billed like a request).
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse

from lamella import JobNotFound, JobState, JobStatus, LamellaError
from lamella.operations import status as read_status
from lamella_gateway import service as services
from lamella_gateway.access import Caller, identify
from lamella_gateway.api_error import ApiError
from lamella_gateway.api_keys import Endpoint
from lamella_gateway.fleet_routes import FRESH
from lamella_gateway.fleet_shapes import JobsBody, clock, job_body
from lamella_gateway.job_list import find_jobs, read_cost
from lamella_gateway.meter import Attachment, Bill
from lamella_gateway.service import Service

DEFAULT_LIMIT = 50
MOST_JOBS = 200


async def list_jobs(request: Request) -> JSONResponse:
    """List the newest jobs."""
    caller = await identify(request, Endpoint.JOBS)
    limit, state = _limit(request), _state(request)
    connection = services.of(request).connection
    user = None if caller.is_admin else caller.user
    found = await connection.run(find_jobs(connection.keys, limit, user, state))
    return JSONResponse(JobsBody(object="list", at=clock(), data=[job_body(job) for job in found]), headers=FRESH)


async def retrieve_job(request: Request) -> JSONResponse:
    """Tell about one job, with its place in the queue while it waits."""
    _, _, job = await _found(request)
    return JSONResponse(job_body(job), headers=FRESH)


async def cancel_job(request: Request) -> JSONResponse:
    """Cancel a job: at once if it waits, at its next sweep if it runs; one that has ended stays as it is."""
    service, _, job = await _found(request)
    await service.client.cancel(job.job_id)
    service.settler.ended([job.job_id])
    return JSONResponse(job_body(await _status(service, job.job_id)), headers=FRESH)


async def retry_job(request: Request) -> JSONResponse:
    """Let a job whose attempts were used up go on as a new one; repeated, it returns the same new job."""
    service, caller, job = await _found(request)
    bill = await _bill(service, caller, job)
    try:
        made = await service.client.retry(job.job_id)
    except LamellaError:
        await service.meter.refund(bill)
        raise
    await service.meter.attach(made.id, Attachment(bill))
    return JSONResponse(job_body(await _status(service, made.id)), headers=FRESH)


async def _bill(service: Service, caller: Caller, job: JobStatus) -> Bill | None:
    """Reserve what a retry may use, on the key of who asks for it."""
    if caller.key is None:
        return None
    tokens = await service.connection.run(read_cost(service.connection.keys, job.job_id))
    return Bill(caller.key.key_id, await service.meter.admit(caller.key, tokens), tokens)


async def _found(request: Request) -> tuple[Service, Caller, JobStatus]:
    service = services.of(request)
    caller = await identify(request, Endpoint.JOBS)
    given = request.path_params["job_id"]
    try:
        job = await _status(service, given)
    except JobNotFound as error:
        raise _not_found(given) from error
    if not caller.sees(job):
        raise _not_found(given)
    return service, caller, job


async def _status(service: Service, job_id: str) -> JobStatus:
    return await service.connection.run(read_status(service.connection.keys, job_id))


def _not_found(given: str) -> ApiError:
    return ApiError(
        404,
        f"there is no job {given[:80]!r}: the id is wrong, or it has expired; GET /lamella/jobs lists those there are",
        param="job_id",
        code="job_not_found",
    )


def _limit(request: Request) -> int:
    for name in request.query_params:
        if name not in ("limit", "state"):
            raise ApiError(400, f"unknown parameter {name[:60]!r}", param=name[:60], code="unknown_parameter")
    given = request.query_params.get("limit", str(DEFAULT_LIMIT))
    if not (given.isascii() and given.isdecimal() and len(given) <= 4 and 1 <= int(given) <= MOST_JOBS):
        raise ApiError(
            400,
            f"limit is {given[:60]!r}; use a whole number from 1 to {MOST_JOBS}",
            param="limit",
            code="invalid_value",
        )
    return int(given)


def _state(request: Request) -> JobState | None:
    given = request.query_params.get("state")
    if given is None:
        return None
    try:
        return JobState(given)
    except ValueError as error:
        raise ApiError(
            400,
            f"state is {given[:60]!r}; use one of {', '.join(JobState)}",
            param="state",
            code="invalid_value",
        ) from error
