"""Asking a worker to bring a model into its host's store, and following it: the exchanges, each once.

Does no I/O (see `steps`). Neighbours: `pull_messages`, the command ``lamella models pull --on``.
"""

from __future__ import annotations

import uuid
from typing import NamedTuple

from lamella import operations
from lamella.errors import DecodeError, RequestError, ServerRefused
from lamella.keys import PULL_ASK_TTL_S, PULLS_ASKED, Keys
from lamella.messages import WorkerInfo, check_model_name
from lamella.pull_messages import PullRequest, PullStatus, decode_pull_status
from lamella.steps import Operation, answers, commands


class Look(NamedTuple):
    """What a look at a pull found: its status if it has one that answers the request, and whether the worker lives."""

    status: PullStatus | None
    is_worker_alive: bool


def ask(keys: Keys, worker: str, model: str, *, serve: bool) -> Operation[str]:
    """Ask the worker for the model; returns the id of the request.

    Raises:
        RequestError: there is no such worker, it is about to stop, or the model's name is none.
        ServerRefused: too many requests wait for that worker.
    """
    try:
        check_model_name(model)
    except ValueError as error:
        raise RequestError(str(error)) from error
    _check(worker, (yield from operations.workers(keys)))
    request = PullRequest(ask_id=uuid.uuid4().hex, model=model, serve=serve)
    list_key = keys.pulls(worker)
    raw = yield commands(
        ("RPUSH", list_key, request.model_dump_json()),
        ("LTRIM", list_key, 0, PULLS_ASKED - 1),
        ("EXPIRE", list_key, PULL_ASK_TTL_S),
        ("LLEN", list_key),
    )
    pushed = answers(raw)
    if int(str(pushed[0])) > PULLS_ASKED:
        raise ServerRefused(f"{PULLS_ASKED} requests wait for worker {worker!r} already; try again in a minute")
    return request.ask_id


def look(keys: Keys, worker: str, model: str, ask_id: str) -> Operation[Look]:
    """Look how far it is."""
    raw = yield commands(("GET", keys.pull(worker, model)), ("EXISTS", keys.worker(worker)))
    told, lives = answers(raw)
    if told is None:
        return Look(None, bool(lives))
    try:
        status = decode_pull_status(str(told))
    except DecodeError as error:
        raise DecodeError(f"worker {worker!r} tells of its pull in words of another version: {error}") from error
    return Look(status if ask_id in status.asks else None, bool(lives))


def _check(name: str, live: list[WorkerInfo]) -> None:
    found = next((worker for worker in live if worker.name == name), None)
    if found is None:
        names = ", ".join(worker.name for worker in live[:20]) or "none (no worker is running)"
        raise RequestError(f"there is no live worker {name!r}; live now: {names}")
    if found.draining:
        raise RequestError(f"worker {name!r} is about to stop and takes no request; ask another one")
